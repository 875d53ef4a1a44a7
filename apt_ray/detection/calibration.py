"""Thresholds and p-values from the anomaly scores of normal images alone.

With n normal images that were not fitted to, the conformal p-value of a score s is `(1 +
#{calibration scores >= s}) / (n + 1)` (Vovk et al., Algorithmic Learning in a Random World, 2.2).
Flagging scores above the j-th largest calibration score, `j = floor(alpha (n + 1))`, rejects at
most a share alpha of good parts, on average over draws of the calibration set.
"""

from collections.abc import Sequence
from math import floor
from statistics import median
from typing import Literal

from pydantic import Field

from apt_ray.config import Settings

SPREAD = 0.23
"""From the median score of good parts to where about one in ten is higher: 1.15 standard deviations
of evidence. Chosen on the validation set, see docs/accuracy.md."""


class Threshold(Settings):
    """Where anomaly scores begin to be rejected.

    Attributes:
        value: images with a higher anomaly score are anomalous.
        certified_false_alarm_rate: the share of good parts that is rejected at most; None if too
            few calibration images were there to promise anything.
        source: what the calibration scores belong to. Scores of support images left out one at a
            time, or of altered copies of the only one, are not exchangeable with new images: they
            set a threshold, but certify nothing and give no p-value.
        scores: the calibration scores.
    """

    value: float = Field(allow_inf_nan=False)
    certified_false_alarm_rate: float | None
    source: Literal["calibration images", "left-out support images", "copies of the support image"]
    scores: tuple[float, ...]

    def moved_to(self, value: float) -> "Threshold":
        """The threshold at a value that somebody names: nothing is certified of it."""
        return self.model_copy(update={"value": value, "certified_false_alarm_rate": None})

    def rejects(self, score: float) -> bool:
        """The verdict: whether an image with this anomaly score is anomalous."""
        return score > self.value

    @property
    def certified(self) -> bool:
        """Whether the false-alarm rate is certified."""
        return self.certified_false_alarm_rate is not None

    def p_value(self, score: float) -> float | None:
        """The conformal p-value of a score, in 0..1; None without calibration images."""
        if self.source != "calibration images":
            return None
        return conformal_p_value(self.scores, score)


def conformal_p_value(calibration_scores: Sequence[float], score: float) -> float:
    """`(1 + #{calibration scores >= score}) / (n + 1)`, in 0..1."""
    above = sum(calibration >= score for calibration in calibration_scores)
    return (1 + above) / (len(calibration_scores) + 1)


def calibrate(scores: Sequence[float], false_alarm_rate: float) -> Threshold:
    """The threshold from images that were not fitted to.

    Too few of them certify nothing: then it is the highest score, above which one good part in
    `n + 1` is expected, and no lower than an estimate where that would be more than twice the rate.
    """
    certified = floor(false_alarm_rate * (len(scores) + 1)) >= 1
    rank = max(1, floor(false_alarm_rate * (len(scores) + 1)))
    value = sorted(scores, reverse=True)[rank - 1]
    if 1 / (len(scores) + 1) > 2 * false_alarm_rate:
        value = max(value, _estimated(scores))
    return Threshold(
        value=value,
        certified_false_alarm_rate=false_alarm_rate if certified else None,
        source="calibration images",
        scores=tuple(scores),
    )


def estimate(
    scores: Sequence[float],
    source: Literal["left-out support images", "copies of the support image"],
) -> Threshold:
    """The uncertified threshold where no image is left for calibration."""
    return Threshold(
        value=_estimated(scores),
        certified_false_alarm_rate=None,
        source=source,
        scores=tuple(scores),
    )


def _estimated(scores: Sequence[float]) -> float:
    """A handful of scores says where their middle lies, and next to nothing of how far they spread:
    the median, and a spread that scores in units of a product's own deviations have in common."""
    return median(scores) + SPREAD
