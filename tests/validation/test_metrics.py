import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as scikit_learn

from apt_ray.errors import DataError, SettingsError
from apt_ray.validation.metrics import (
    LEVELS,
    aupro,
    counts_above,
    image_auroc,
    pixel_auroc,
    pixel_auroc_and_aupro,
    precision_recall_curve,
    roc_curve,
)


def brute_force_aupro(maps: list[np.ndarray], masks: list[np.ndarray], max_fpr: float) -> float:
    """Every distinct score as a threshold, every region counted at each."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == number) for number in range(1, count + 1)]
    normal = sum((~mask).sum() for mask in masks)
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(np.concatenate([m.ravel() for m in maps])), reverse=True):
        hits = [m >= threshold for m in maps]
        false = sum((hit & ~mask).sum() for hit, mask in zip(hits, masks, strict=True))
        overlap = np.mean([hits[index][region].mean() for index, region in regions])
        curve.append((false / normal, overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < max_fpr < x1:
            at_limit = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            area += (max_fpr - x0) * (y0 + at_limit) / 2
        elif x1 <= max_fpr:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


@pytest.mark.parametrize("levels", [3, 12, 10**6])
@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_aupro_equals_brute_force(levels: int, max_fpr: float, seed: int) -> None:
    """With few levels nearly every score is tied."""
    rng = np.random.default_rng(seed)
    masks = [rng.random((12, 9)) < share for share in (0.0, 0.05, 0.3)]
    maps = [
        (rng.integers(0, levels, mask.shape) + mask * levels // 4).astype(np.float32)
        for mask in masks
    ]
    assert aupro(maps, masks, max_fpr=max_fpr) == pytest.approx(
        brute_force_aupro(maps, masks, max_fpr), abs=1e-12
    )
    assert pixel_auroc_and_aupro(maps, masks, max_fpr=max_fpr) == (
        pixel_auroc(maps, masks),
        aupro(maps, masks, max_fpr=max_fpr),
    )


def test_aupro_written_out() -> None:
    """From the highest score down: small region, half the large one, normal, the other half.

    So the overlap is (1 + 1/2) / 2 = 3/4 until the false-positive rate is 1/4, then 1.
    """
    mask = np.array([[1, 0, 1, 1, 0, 0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1, 0.8, 0.6, 0.7, 0.2, 0.3]], dtype=np.float32)
    assert aupro([scores], [mask], max_fpr=1.0) == pytest.approx(0.25 * 0.75 + 0.75)
    assert aupro([scores], [mask], max_fpr=0.3) == pytest.approx((0.25 * 0.75 + 0.05) / 0.3)
    assert aupro([scores], [mask], max_fpr=0.2) == pytest.approx(0.75)


def test_aupro_weighs_regions_alike_and_counts_diagonal_neighbours_as_one() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[0, 0] = mask[1, 1] = True  # one region: they touch by a corner
    mask[5:, 5:] = True
    only_large_found = np.where(np.arange(100).reshape(10, 10) >= 55, mask, False)
    assert aupro([only_large_found.astype(np.float32)], [mask], max_fpr=1e-9) == pytest.approx(0.5)


def test_perfect_and_useless_maps() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 2:4] = True
    perfect = mask.astype(np.float32)
    flat = np.zeros((8, 8), np.float32)
    assert pixel_auroc([perfect], [mask]) == aupro([perfect], [mask]) == 1
    assert pixel_auroc([-perfect], [mask]) == aupro([-perfect], [mask]) == 0
    assert pixel_auroc([flat], [mask]) == 0.5
    assert aupro([flat], [mask]) == pytest.approx(0.15)  # the diagonal up to 0.3


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_equals_scikit_learn(levels: int) -> None:
    rng = np.random.default_rng(levels)
    maps = [rng.integers(0, levels, shape).astype(np.float32) for shape in ((20, 30), (7, 50))]
    masks = [rng.random(m.shape) < 0.2 for m in maps]
    flat_maps = np.concatenate([m.ravel() for m in maps])
    flat_masks = np.concatenate([m.ravel() for m in masks])
    expected = scikit_learn.roc_auc_score(flat_masks, flat_maps)
    assert pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-12)
    assert image_auroc(flat_maps, flat_masks) == pytest.approx(expected, abs=1e-12)


class Made(Sequence[Any]):
    """Items that exist only while somebody looks at them."""

    def __init__(self, count: int, make: Callable[[int], np.ndarray]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        return self.make(range(self.count)[place])


@pytest.mark.slow
def test_maps_that_are_made_when_asked_for_take_the_memory_of_a_few() -> None:
    side, count = 1000, 40

    def make_map(place: int) -> np.ndarray:
        return np.random.default_rng(place).random((side, side), np.float32)

    def make_mask(place: int) -> np.ndarray:
        mask = np.zeros((side, side), dtype=bool)
        mask[place : place + 20, :50] = place % 2
        return mask

    maps, masks = Made(count, make_map), Made(count, make_mask)
    tracemalloc.start()
    try:
        lazy = pixel_auroc_and_aupro(maps, masks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * side**2 * count * 0.6
    assert lazy == pixel_auroc_and_aupro(list(maps), list(masks))
    flat = np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])
    assert lazy[0] == pytest.approx(scikit_learn.roc_auc_score(*flat), abs=1e-12)


def test_an_image_of_more_defect_pixels_than_thresholds_is_measured_as_closely() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((700, 400)) < share for share in (0.6, 0.01)]
    assert masks[0].sum() > 2 * LEVELS
    maps = [(rng.random(m.shape) + 0.3 * m).astype(np.float32) for m in masks]
    flat = np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])
    exact = scikit_learn.roc_auc_score(*flat)
    assert 0 <= pixel_auroc(maps, masks) - exact < 2e-5


@pytest.mark.parametrize("levels", [3, 10**6])
def test_curves_equal_those_of_scikit_learn(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, is_anomalous = rng.integers(0, levels, 60) / levels, rng.random(60) < 0.3
    counts = counts_above(scores, is_anomalous)
    false_alarms, found, _ = scikit_learn.roc_curve(is_anomalous, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc_curve(*counts), (false_alarms, found))
    precision, recall, _ = scikit_learn.precision_recall_curve(is_anomalous, scores)
    np.testing.assert_allclose(precision_recall_curve(*counts), (recall[::-1], precision[::-1]))


def test_image_auroc_written_out() -> None:
    """Of four pairs 0.8 wins both, 0.3 ties with 0.3 (one half) and loses to 0.5."""
    assert image_auroc([0.3, 0.5, 0.8, 0.3], [False, False, True, True]) == 2.5 / 4


def test_arguments_are_left_alone() -> None:
    scores = np.array([3.0, 1.0, 2.0])
    image_auroc(scores, [True, False, False])
    np.testing.assert_array_equal(scores, [3.0, 1.0, 2.0])


@pytest.mark.parametrize("metric", [pixel_auroc, aupro])
@pytest.mark.parametrize(("share", "lacking"), [(0, "anomalous pixels"), (1, "normal pixels")])
def test_one_class_has_no_metric(metric: object, share: int, lacking: str) -> None:
    mask = np.full((4, 4), bool(share))
    with pytest.raises(DataError, match=f"undefined without {lacking}"):
        metric([np.zeros((4, 4), np.float32)], [mask])


def test_no_images_have_no_metric() -> None:
    with pytest.raises(DataError):
        pixel_auroc([], [])
    with pytest.raises(DataError):
        image_auroc([], [])
    with pytest.raises(DataError, match="undefined without anomalous images"):
        image_auroc([0.1, 0.2], [False, False])


@pytest.mark.parametrize("where", [(0, 0), (3, 3)])
@pytest.mark.parametrize("metric", [pixel_auroc, aupro])
def test_nan_is_an_error(metric: object, where: tuple[int, int]) -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 0] = True
    scores = np.random.default_rng(0).random((4, 4))
    scores[where] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metric([scores], [mask])


def test_arguments_must_match() -> None:
    square, mask = np.zeros((4, 4), np.float32), np.zeros((4, 4), dtype=bool)
    with pytest.raises(ValueError, match="map 1"):
        pixel_auroc([square, square], [mask, mask[:2]])
    with pytest.raises(ValueError, match="2 maps but 1 masks"):
        aupro([square, square], [mask])
    with pytest.raises(ValueError, match="float32"):
        aupro([square], [square])
    with pytest.raises(ValueError, match="one score and one label"):
        image_auroc([0.1, 0.2], [True])
    with pytest.raises(SettingsError, match="max_fpr"):
        aupro([square], [mask], max_fpr=0)
