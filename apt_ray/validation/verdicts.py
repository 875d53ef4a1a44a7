"""What a threshold makes of test images: how many it rejects of the good ones and of each defect.

I test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from apt_ray.detection.calibration import Threshold
from apt_ray.validation.intervals import ImageScores

_TAIL = 0.025


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """How many of some test images, at least one, a threshold rejects."""

    count: int
    images: int

    @property
    def share(self) -> float:
        """The share that is rejected, in 0..1."""
        return self.count / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of the rate that the share estimates, at this very threshold, in
        0..1 (Clopper and Pearson, Biometrika 26, 1934)."""
        k, n = self.count, self.images
        low = float(betaincinv(k, n - k + 1, _TAIL)) if k > 0 else 0.0
        high = float(betaincinv(k + 1, n - k, 1 - _TAIL)) if k < n else 1.0
        return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What a threshold makes of the test images of a category.

    Attributes:
        good: of the normal images; those rejected are false alarms.
        defects: of the anomalous images; those rejected are found.
        by_type: defect type -> of its images, in the order of the names.
    """

    good: Rejected
    defects: Rejected
    by_type: Mapping[str, Rejected]

    @classmethod
    def of(cls, scores: ImageScores, threshold: Threshold) -> Verdicts:
        """Those of `threshold` on images that were scored as its prompt set scores them."""
        rejects_I = np.array([threshold.rejects(score) for score in scores.score_I.tolist()])
        types_I = np.array(scores.defect_types)

        def among(where_I: NDArray[np.bool_]) -> Rejected:
            return Rejected(count=int(rejects_I[where_I].sum()), images=int(where_I.sum()))

        return cls(
            good=among(~scores.is_anomalous_I),
            defects=among(scores.is_anomalous_I),
            by_type={
                str(name): among(types_I == name)
                for name in sorted(set(types_I[scores.is_anomalous_I]))
            },
        )
