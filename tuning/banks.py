"""The banks that the trials of a category learn from: which there are, and where. No PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import FitSettings

if TYPE_CHECKING:
    from ray import ObjectRef

    from apt_ray.anomalies.bank import SupportBank

BankRefs = Mapping[str, "ObjectRef[SupportBank]"]
"""The digest of a bank's spec -> the bank in Ray's object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryBanks:
    """All banks that the trials of a category may ask for.

    Attributes:
        specs: one for each support seed, in their order, for each place that noise may fall in.
        refs: where they are, or will be.
    """

    specs: tuple[BankSpec, ...]
    refs: BankRefs

    def of(self, settings: FitSettings) -> BankRefs:
        """Those that a trial with these settings learns from, in the order of the support seeds."""
        digests = [spec.digest for spec in self.specs if spec.suits(settings)]
        return {digest: self.refs[digest] for digest in digests}
