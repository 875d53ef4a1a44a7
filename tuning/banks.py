"""What the trials of a category learn from and are judged by: which there are, and where. No
PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt_ray.anomalies.spec import BankSpec, JudgeSpec
from apt_ray.config import FitSettings

if TYPE_CHECKING:
    from ray import ObjectRef

    from apt_ray.anomalies.bank import SupportBank
    from apt_ray.validation.judge import Judge

EncodedRefs = Mapping[str, "ObjectRef[SupportBank | Judge]"]
"""The digest of a spec -> what was encoded of it, in Ray's object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryBanks:
    """All banks and judges that the trials of a category may ask for.

    Attributes:
        specs: of banks, one for each support seed, in their order, for each place that noise may
            fall in.
        judges: specs of judges, one for each support seed, in their order, for each encoder and
            memory.
        refs: where they are, or will be.
    """

    specs: tuple[BankSpec, ...]
    judges: tuple[JudgeSpec, ...]
    refs: EncodedRefs

    def of(self, settings: FitSettings) -> EncodedRefs:
        """The banks that a trial with these settings learns from, in the order of the support
        seeds."""
        return {spec.digest: self.refs[spec.digest] for spec in self.specs if spec.suits(settings)}

    def judging(self, settings: FitSettings, fingerprint: str) -> EncodedRefs:
        """The judges of such a trial, of the encoder with this fingerprint, in the same order."""
        wanted = [
            JudgeSpec.of(settings, spec.support, fingerprint=fingerprint, seed=spec.seed)
            for spec in self.specs
            if spec.suits(settings)
        ]
        return {spec.digest: self.refs[spec.digest] for spec in wanted}
