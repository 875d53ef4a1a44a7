import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from apt_ray.errors import DataError
from apt_ray.validation.intervals import (
    ImageScores,
    by_defect_type,
    compare,
    format_differences,
    format_types,
    histogram,
    in_one_only,
    load_scores,
    save_scores,
)
from apt_ray.validation.metrics import pixel_auroc

TYPES = ("good",) * 30 + ("crack",) * 20 + ("stain",) * 10


def scores(seed: int, shift: float, *, pixels: bool = True) -> ImageScores:
    """Scores of 60 images of which the defective ones lie higher by `shift` (in logits)."""
    rng = np.random.default_rng(seed)
    is_anomalous = np.array([name != "good" for name in TYPES])
    maps = [1 / (1 + np.exp(-rng.normal(size=(8, 8)))) for _ in TYPES]
    masks = [np.zeros((8, 8), dtype=bool) for _ in TYPES]
    for i in np.flatnonzero(is_anomalous):
        masks[i][:3, :3] = True
        maps[i][:3, :3] **= np.exp(-shift)
    return ImageScores(
        variant="both",
        category="tile",
        seed=seed,
        names=tuple(f"{i}.png" for i in range(len(TYPES))),
        defect_types=TYPES,
        score_I=rng.normal(size=len(TYPES)) + shift * is_anomalous,
        is_anomalous_I=is_anomalous,
        normal_IH=np.stack([histogram(m, ~k) for m, k in zip(maps, masks, strict=True)])
        if pixels
        else None,
        anomalous_IH=np.stack([histogram(m, k) for m, k in zip(maps, masks, strict=True)])
        if pixels
        else None,
    )


def test_a_histogram_keeps_the_order_of_the_values() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.beta(0.1, 4, size=(50, 40)).astype(np.float32) for _ in range(6)]
    masks = [rng.random((50, 40)) < m + 0.1 for m in maps]
    one = replace(
        scores(0, 0.0),
        names=("x",) * 6,
        defect_types=("good", *("crack",) * 5),
        score_I=np.arange(6.0),
        is_anomalous_I=np.arange(6) > 0,
        normal_IH=np.stack([histogram(m, ~k) for m, k in zip(maps, masks, strict=True)]),
        anomalous_IH=np.stack([histogram(m, k) for m, k in zip(maps, masks, strict=True)]),
    )
    (figures,) = by_defect_type(one)
    assert figures.pixel_auroc == pytest.approx(pixel_auroc(maps, masks), abs=1e-3)


def test_a_defect_type_is_measured_against_all_good_images() -> None:
    one = scores(0, 1.0)
    crack, stain = by_defect_type(one)
    assert (crack.defect_type, crack.images) == ("crack", 20)
    assert (stain.defect_type, stain.images) == ("stain", 10)
    kept = np.array([name in ("good", "stain") for name in TYPES])
    expected = roc_auc_score(one.is_anomalous_I[kept], one.score_I[kept])
    assert stain.image_auroc == pytest.approx(expected)
    assert "| tile | stain | 10 | both |" in format_types([one])
    without = by_defect_type(scores(0, 1.0, pixels=False))
    assert without[0].pixel_auroc is None


def test_the_interval_tells_a_better_run_from_an_equal_one() -> None:
    before = [scores(seed, 0.3) for seed in (0, 1)]
    better = [replace(scores(seed, 2.5), seed=seed) for seed in (0, 1)]
    image, pixel = compare(before, better, resamples=300)
    assert (image.metric, pixel.metric) == ("image_auroc", "pixel_auroc")
    for difference in (image, pixel):
        assert 0 < difference.low < difference.after - difference.before < difference.high
    expected = np.mean([roc_auc_score(s.is_anomalous_I, s.score_I) for s in before])
    assert image.before == pytest.approx(expected)
    same = compare(before, before, resamples=50)
    assert all(d.low == d.high == 0 for d in same)
    assert re.search(r"\| tile \| both \| image AUROC \|.*\+", format_differences([image]))


def test_without_masks_only_images_are_compared() -> None:
    before, after = (scores(0, shift, pixels=False) for shift in (0.3, 1.0))
    assert [d.metric for d in compare([before], [after], resamples=20)] == ["image_auroc"]


def test_runs_that_cannot_be_paired_are_refused() -> None:
    one = scores(0, 1.0)
    with pytest.raises(DataError, match="no category, variant and seed in common"):
        compare([one], [replace(one, seed=1)])
    with pytest.raises(DataError, match=r"other test images.*\(2 are not in both, such as .*\.png"):
        compare([one], [replace(one, names=(*one.names[1:], "new.png"))])
    with pytest.raises(DataError, match="other labels"):
        compare([one], [replace(one, defect_types=("good", *one.defect_types[1:-1], "good"))])


def test_what_is_in_one_run_only_is_said() -> None:
    one, blind = scores(0, 1.0), scores(1, 1.0, pixels=False)
    assert in_one_only([one], [one]) == []
    before = [one, replace(one, seed=1), replace(one, category="nut")]
    assert in_one_only(before, [one, blind]) == [
        "nut, both, seed 0, image AUROC: only before",
        "nut, both, seed 0, pixel AUROC: only before",
        "tile, both, seed 1, pixel AUROC: only before",
    ]
    assert in_one_only([one], [one, blind]) == ["tile, both, seed 1, image AUROC: only after"]


def test_scores_survive_the_file_and_other_files_are_refused(tmp_path: Path) -> None:
    written = [scores(0, 1.0), scores(1, 1.0, pixels=False)]
    save_scores(tmp_path / "scores.npz", written)
    read = load_scores(tmp_path / "scores.npz")
    assert [(s.variant, s.category, s.seed, s.names) for s in read] == [
        (s.variant, s.category, s.seed, s.names) for s in written
    ]
    assert np.array_equal(read[0].score_I, written[0].score_I)
    assert read[0].normal_IH is not None
    assert written[0].normal_IH is not None
    assert np.array_equal(read[0].normal_IH, written[0].normal_IH)
    assert read[1].anomalous_IH is None
    (tmp_path / "other.npz").write_text("{}")
    with pytest.raises(DataError, match="holds no scores"):
        load_scores(tmp_path / "other.npz")
    with pytest.raises(DataError, match="holds no scores"):
        load_scores(tmp_path / "missing.npz")
    whole = (tmp_path / "scores.npz").read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        (tmp_path / "other.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="holds no scores"):
            load_scores(tmp_path / "other.npz")
