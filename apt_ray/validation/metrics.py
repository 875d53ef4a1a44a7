"""Detection metrics, exact: every distinct score is a threshold, nothing is binned.

Maps and masks are gone through twice, one at a time: once for the anomalous pixels, then to count
the normal ones, usually far more, below the scores of those. So sequences that compute their items
when they are asked for are measured in the memory of a few, however many and large they are. Only
where an image has more than `LEVELS` anomalous pixels, its thresholds are that many of their
scores, evenly spread in rank; AUROC is then less than 2e-5 above the exact one.

L anomalous scores, in ascending order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from apt_ray.auroc import auroc
from apt_ray.errors import DataError, SettingsError

AnyArray = NDArray[Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVELS = 2**16
"""Thresholds that one image's anomalous pixels give at most."""

_SORTED_AT_ONCE = 2**23  # normal pixels: 32 MiB of float32

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def image_auroc(scores: ArrayLike, is_anomalous: ArrayLike) -> float:
    """Area under the ROC curve of anomaly scores; equal scores count one half.

    Both arguments have one entry per image. Raises DataError if only one class is present.
    """
    values, labels = np.asarray(scores), np.asarray(is_anomalous, dtype=bool)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ValueError(
            f"expected one score and one label per image, got {values.shape} and {labels.shape}"
        )
    normal = _sorted_scores(values[~labels], "normal images")
    return auroc(normal, _sorted_scores(values[labels], "anomalous images"))


def pixel_auroc(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> float:
    """Area under the ROC curve over all pixels of all images.

    `maps` are anomaly maps (H, W), `masks` ground-truth masks (H, W) bool of the same size.
    Raises DataError if only one class is present.
    """
    return _Pixels.of(maps, masks, regions=False).auroc()


def pixel_auroc_and_aupro(
    maps: Sequence[AnyArray], masks: Sequence[AnyArray], *, max_fpr: float = 0.3
) -> tuple[float, float]:
    """`pixel_auroc` and `aupro` for little more than one of them: sorting is what costs."""
    _check_limit(max_fpr)
    pixels = _Pixels.of(maps, masks)
    return pixels.auroc(), pixels.aupro(max_fpr)


def aupro(maps: Sequence[AnyArray], masks: Sequence[AnyArray], *, max_fpr: float = 0.3) -> float:
    """Area under the per-region overlap curve up to `max_fpr`, divided by `max_fpr`.

    The overlap is the mean, over all 8-connected defect regions, of the share of a region that
    lies at or above the threshold; the false-positive rate is taken over all normal pixels
    (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 6.2). Raises
    DataError if there is no defect region or no normal pixel.
    """
    _check_limit(max_fpr)
    return _Pixels.of(maps, masks).aupro(max_fpr)


def counts_above(scores: ArrayLike, is_anomalous: ArrayLike) -> tuple[Floats, Floats]:
    """Normal and anomalous images at or above each distinct score, the highest score first.

    Both arguments have one entry per image; the counts are what `roc_curve` and
    `precision_recall_curve` are drawn from.
    """
    labels = np.asarray(is_anomalous, dtype=bool)
    levels, place = np.unique(np.asarray(scores), return_inverse=True)
    normal, anomalous = (
        np.bincount(place[chosen], minlength=levels.size)[::-1].cumsum(dtype=np.float64)
        for chosen in (~labels, labels)
    )
    return normal, anomalous


def roc_curve(normal: Floats, anomalous: Floats) -> tuple[Floats, Floats]:
    """False-positive and true-positive rate, from (0, 0) to (1, 1).

    Takes how many of each lie above falling thresholds, the last below all of them.
    """
    return np.append(0.0, normal / normal[-1]), np.append(0.0, anomalous / anomalous[-1])


def precision_recall_curve(normal: Floats, anomalous: Floats) -> tuple[Floats, Floats]:
    """Recall and precision from the same counts; where nothing is flagged, precision is 1."""
    return (
        np.append(0.0, anomalous / anomalous[-1]),
        np.append(1.0, anomalous / (normal + anomalous)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pixels:
    """What both metrics need to know of all pixels.

    Attributes:
        score_L: anomalous scores, some of them equal.
        count_L: anomalous pixels that have each.
        weight_L: the sum of 1 / size of their regions over these.
        below_L, not_above_L: normal pixels below each score, and not above it.
        normal: normal pixels in all.
    """

    score_L: AnyArray
    count_L: Integers
    weight_L: Floats
    below_L: Integers
    not_above_L: Integers
    normal: int

    @classmethod
    def of(
        cls, maps: Sequence[AnyArray], masks: Sequence[AnyArray], *, regions: bool = True
    ) -> "_Pixels":
        """Count them; without `regions` every weight is 1."""
        if len(maps) != len(masks):
            raise ValueError(f"got {len(maps)} maps but {len(masks)} masks")
        parts, normal = [], 0
        for index, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
            _check_pair(index, map_HW, mask_HW)
            normal += int(mask_HW.size - np.count_nonzero(mask_HW))
            if mask_HW.any():
                weights = _region_weights(mask_HW) if regions else np.ones(mask_HW.sum())
                parts.append(_levels(map_HW[mask_HW], weights))
        _require_present(len(parts), "anomalous pixels")
        _require_present(normal, "normal pixels")
        score_L, count_L, weight_L = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(score_L)
        score_L = score_L[order]
        below_L = np.zeros(score_L.size, np.int64)
        not_above_L = np.zeros(score_L.size, np.int64)
        for scores in _normal_pixels(maps, masks):
            scores.sort()
            _require_numbers(scores[-1:])
            below_L += np.searchsorted(scores, score_L, side="left")
            not_above_L += np.searchsorted(scores, score_L, side="right")
            del scores  # before the next are collected
        return cls(
            score_L=score_L,
            count_L=count_L[order],
            weight_L=weight_L[order],
            below_L=below_L,
            not_above_L=not_above_L,
            normal=normal,
        )

    def auroc(self) -> float:
        """As `apt_ray.auroc.auroc` has it, from the counts."""
        twice = (self.count_L * (self.below_L + self.not_above_L)).sum(dtype=np.float64)
        return float(twice / (2 * self.normal * int(self.count_L.sum())))

    def aupro(self, max_fpr: float) -> float:
        """As the function `aupro` says."""
        scores, overlap = self.score_L[::-1], np.cumsum(self.weight_L[::-1])
        overlap /= overlap[-1]
        last_of_tie = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
        overlap = overlap[last_of_tie]

        # The curve has two corners for each distinct anomalous score: just above it, and at it.
        # Between two such scores only the false-positive rate moves.
        fpr = np.empty(2 * last_of_tie.size)
        fpr[0::2] = (self.normal - self.not_above_L[::-1][last_of_tie]) / self.normal
        fpr[1::2] = (self.normal - self.below_L[::-1][last_of_tie]) / self.normal
        pro = np.empty_like(fpr)
        pro[0::2] = np.append(0.0, overlap[:-1])
        pro[1::2] = overlap
        return _area_up_to(fpr, pro, max_fpr) / max_fpr


def _levels(scores: AnyArray, weights: Floats) -> tuple[AnyArray, Integers, Floats]:
    """One image's anomalous scores, ascending, how many pixels have each, and their weights.

    Of more than `LEVELS` pixels, neighbours in rank take the highest score among them.
    """
    order = np.argsort(scores)
    _require_numbers(scores[order[-1:]])
    groups = min(scores.size, LEVELS)
    start = np.arange(groups + 1) * scores.size // groups
    return (
        scores[order[start[1:] - 1]],
        np.diff(start),
        np.add.reduceat(weights[order], start[:-1]),
    )


def _normal_pixels(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> Iterator[AnyArray]:
    """The scores of all normal pixels, some millions at a time."""
    parts: list[AnyArray] = []
    for place, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True), 1):
        parts.append(map_HW[~mask_HW])
        if place == len(maps) or sum(part.size for part in parts) >= _SORTED_AT_ONCE:
            joined, parts = np.concatenate(parts), []
            yield joined
            del joined


def _sorted_scores(scores: AnyArray, what: str) -> AnyArray:
    _require_present(scores.size, what)
    scores.sort()
    _require_numbers(scores[-1:])
    return scores


def _require_present(count: int, what: str) -> None:
    if count == 0:
        raise DataError(f"the metric is undefined without {what}: add test images that have them")


def _require_numbers(largest: AnyArray) -> None:
    if np.isnan(largest).any():  # a sort puts NaN behind every number
        raise ValueError("a score is not a number (NaN)")


def _area_up_to(x: Floats, y: Floats, limit: float) -> float:
    """Area under the polyline from (0, 0) through (x, y), held level behind its end."""
    inside = x <= limit
    x_cut = np.concatenate(([0.0], x[inside], [limit]))
    y_cut = np.concatenate(([0.0], y[inside], [_height_at(x, y, limit)]))
    return float(np.sum(np.diff(x_cut) * (y_cut[1:] + y_cut[:-1])) / 2)


def _height_at(x: Floats, y: Floats, limit: float) -> float:
    after = int(np.searchsorted(x, limit, side="right"))
    if after == x.size:
        return float(y[-1])
    x0, y0 = (x[after - 1], y[after - 1]) if after else (0.0, 0.0)
    return float(y0 + (y[after] - y0) * (limit - x0) / (x[after] - x0))


def _check_limit(max_fpr: float) -> None:
    if not 0 < max_fpr <= 1:
        raise SettingsError(f"max_fpr must be in (0, 1], got {max_fpr}")


def _check_pair(index: int, map_HW: AnyArray, mask_HW: AnyArray) -> None:
    if map_HW.ndim != 2 or map_HW.shape != mask_HW.shape or mask_HW.dtype != np.bool_:
        raise ValueError(
            f"map {index} is {map_HW.shape} but its mask {mask_HW.shape} {mask_HW.dtype}; "
            "both must be (H, W), the mask bool"
        )


def _region_weights(mask_HW: AnyArray) -> Floats:
    """For each anomalous pixel, in their order: 1 / size of its region."""
    region = ndimage.label(mask_HW, structure=_EIGHT_CONNECTED)[0][mask_HW]
    weights: Floats = 1.0 / np.bincount(region)[region]
    return weights
