"""Detection metrics, exact: every distinct score is a threshold, nothing is binned.

Only the anomalous scores are paired with their weights; the normal ones, usually far more, are
sorted in place and counted by bisection. That keeps tens of millions of pixels cheap.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from apt_ray.auroc import auroc
from apt_ray.errors import DataError, SettingsError

AnyArray = NDArray[Any]
Floats = NDArray[np.float64]

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
    return _auroc(_sorted_scores(values[~labels], "normal images"), values[labels], "images")


def pixel_auroc(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> float:
    """Area under the ROC curve over all pixels of all images.

    `maps` are anomaly maps (H, W), `masks` ground-truth masks (H, W) bool of the same size.
    Raises DataError if only one class is present.
    """
    _check_pairs(maps, masks)
    return _auroc(_sorted_normal_pixels(maps, masks), _anomalous_pixels(maps, masks), "pixels")


def pixel_auroc_and_aupro(
    maps: Sequence[AnyArray], masks: Sequence[AnyArray], *, max_fpr: float = 0.3
) -> tuple[float, float]:
    """`pixel_auroc` and `aupro` for little more than one of them: sorting is what costs."""
    _check_pairs(maps, masks)
    normal, scores = _sorted_normal_pixels(maps, masks), _anomalous_pixels(maps, masks)
    return (
        _auroc(normal, scores.copy(), "pixels"),
        _aupro(normal, scores, _region_weights(masks), max_fpr),
    )


def aupro(maps: Sequence[AnyArray], masks: Sequence[AnyArray], *, max_fpr: float = 0.3) -> float:
    """Area under the per-region overlap curve up to `max_fpr`, divided by `max_fpr`.

    The overlap is the mean, over all 8-connected defect regions, of the share of a region that
    lies at or above the threshold; the false-positive rate is taken over all normal pixels
    (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 6.2). Raises
    DataError if there is no defect region or no normal pixel.
    """
    _check_pairs(maps, masks)
    normal = _sorted_normal_pixels(maps, masks)
    return _aupro(normal, _anomalous_pixels(maps, masks), _region_weights(masks), max_fpr)


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


def _aupro(normal: AnyArray, scores: AnyArray, weights: Floats, max_fpr: float) -> float:
    """From the sorted scores of normal pixels, and anomalous ones with their weights."""
    if not 0 < max_fpr <= 1:
        raise SettingsError(f"max_fpr must be in (0, 1], got {max_fpr}")
    _require_present(scores, "anomalous pixels")

    order = np.argsort(scores)[::-1]
    scores = scores[order]
    _require_numbers(scores[:1])
    overlap = np.cumsum(weights[order])
    overlap /= overlap[-1]
    last_of_tie = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
    levels, overlap = scores[last_of_tie], overlap[last_of_tie]

    # The curve has two corners for each distinct anomalous score: just above it, and at it.
    # Between two such scores only the false-positive rate moves.
    fpr = np.empty(2 * levels.size)
    fpr[0::2] = (normal.size - np.searchsorted(normal, levels, side="right")) / normal.size
    fpr[1::2] = (normal.size - np.searchsorted(normal, levels, side="left")) / normal.size
    pro = np.empty_like(fpr)
    pro[0::2] = np.append(0.0, overlap[:-1])
    pro[1::2] = overlap
    return _area_up_to(fpr, pro, max_fpr) / max_fpr


def _auroc(normal: AnyArray, anomalous: AnyArray, unit: str) -> float:
    """`normal` is sorted already; `anomalous` is sorted here."""
    anomalous = _sorted_scores(anomalous, f"anomalous {unit}")
    return auroc(normal, anomalous)


def _sorted_scores(scores: AnyArray, what: str) -> AnyArray:
    _require_present(scores, what)
    scores.sort()
    _require_numbers(scores[-1:])
    return scores


def _require_present(scores: AnyArray, what: str) -> None:
    if scores.size == 0:
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


def _check_pairs(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> None:
    if len(maps) != len(masks):
        raise ValueError(f"got {len(maps)} maps but {len(masks)} masks")
    for index, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
        if map_HW.ndim != 2 or map_HW.shape != mask_HW.shape or mask_HW.dtype != np.bool_:
            raise ValueError(
                f"map {index} is {map_HW.shape} but its mask {mask_HW.shape} {mask_HW.dtype}; "
                "both must be (H, W), the mask bool"
            )


def _sorted_normal_pixels(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> AnyArray:
    parts = [map_HW[~mask_HW] for map_HW, mask_HW in zip(maps, masks, strict=True)]
    return _sorted_scores(_joined(parts), "normal pixels")


def _anomalous_pixels(maps: Sequence[AnyArray], masks: Sequence[AnyArray]) -> AnyArray:
    return _joined([map_HW[mask_HW] for map_HW, mask_HW in zip(maps, masks, strict=True)])


def _region_weights(masks: Sequence[AnyArray]) -> Floats:
    """For each anomalous pixel, in the order of `_anomalous_pixels`: 1 / size of its region."""
    parts = []
    for mask_HW in masks:
        if mask_HW.any():
            region = ndimage.label(mask_HW, structure=_EIGHT_CONNECTED)[0][mask_HW]
            parts.append(1.0 / np.bincount(region)[region])
    return _joined(parts)


def _joined(parts: list[AnyArray]) -> AnyArray:
    return np.concatenate(parts) if parts else np.empty(0)
