import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.calibration import calibrate
from apt_ray.errors import DataError, SettingsError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.validation.evaluation import Result, TestSet, evaluate, format_table
from apt_ray.validation.intervals import by_defect_type
from tests.validation.test_intervals import scores

QUICK = FitSettings(steps=2)
NEVER = calibrate([100.0], false_alarm_rate=0.5)


def test_every_seed_is_reported_in_three_ways(backbone: FrozenCLIP, category: Category) -> None:
    results = evaluate(category, backbone=backbone, shots=2, seeds=(0, 1), settings=QUICK)
    assert [(result.seed, result.variant) for result in results] == [
        (seed, variant) for seed in (0, 1) for variant in ("prompts", "reference", "both")
    ]
    for result in results:
        for value in (result.image_auroc, result.pixel_auroc, result.aupro):
            assert value is not None
            assert 0 <= value <= 1
        figures = by_defect_type(result.scores)
        defective = [image for image in category.test if image.is_anomalous]
        assert sum(one.images for one in figures) == len(defective)
        # Every defective image counts once, so the whole is the mean weighted by the images.
        mean = sum(one.images * one.image_auroc for one in figures) / len(defective)
        assert mean == pytest.approx(result.image_auroc)


def _plain_category(root: Path, category: Category, masks: bool = False) -> Category:
    """Good and defective images side by side, without masks; support and test share `good`."""
    for kind, paths in {
        "good": category.good[:4],
        "defective": [image.path for image in category.test if image.is_anomalous][:2],
    }.items():
        (root / category.name / kind).mkdir(parents=True)
        for path in paths:
            Image.open(path).save(root / category.name / kind / path.name)
    (found,) = find_categories(root)
    return found


def test_without_masks_there_are_no_pixel_metrics_and_support_images_are_not_tested(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    plain = _plain_category(tmp_path, category)
    results = evaluate(plain, backbone=backbone, shots=2, seeds=(0,), settings=QUICK)
    assert all(result.pixel_auroc is None and result.aupro is None for result in results)
    assert all(result.image_auroc is not None for result in results)
    with pytest.raises(DataError, match="undefined without normal images"):
        evaluate(plain, backbone=backbone, shots=4, seeds=(0,), settings=QUICK)


def test_shares_at_the_threshold_are_those_of_the_scores(
    backbone: FrozenCLIP, category: Category
) -> None:
    *others, both = evaluate(category, backbone=backbone, shots=2, seeds=(0,), settings=QUICK)
    for other in others:
        assert other.good_rejected is None
        assert other.defects_found is None
        assert other.as_dict()["defects_found_interval"] is None
    assert both.threshold is not None
    assert both.threshold.source == "left-out support images"
    above = both.scores.score_I > both.threshold.value
    anomalous = both.scores.is_anomalous_I
    figures = both.as_dict()
    for name, where in {"good_rejected": ~anomalous, "defects_found": anomalous}.items():
        assert figures[name] == getattr(both, name) == above[where].mean()
        low, high = figures[f"{name}_interval"]  # type: ignore[misc]
        assert low <= above[where].mean() <= high
    types = figures["defects_found_by_type"]
    assert isinstance(types, dict)
    assert set(types) == set(both.scores.defect_types) - {"good"}
    assert figures["threshold"] == both.threshold.model_dump()


def test_thresholds_can_be_set_from_images_that_are_neither_learned_from_nor_tested(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    plain = _plain_category(tmp_path, category)
    settings = QUICK.model_copy(update={"false_alarm_rate": 0.5})
    *_, without = evaluate(plain, backbone=backbone, shots=2, seeds=(0,), settings=settings)
    *_, both = evaluate(
        plain, backbone=backbone, shots=2, seeds=(0,), settings=settings, calibration=1
    )
    assert without.threshold is not None
    assert both.threshold is not None
    assert both.threshold.source == "calibration images"
    assert both.threshold.certified_false_alarm_rate == 0.5
    (used,) = plain.draw(2, seed=0, calibration=1).calibration
    assert set(without.scores.names) - set(both.scores.names) == {plain.name_of(used)}
    # The same prompts and memory: it scores here what it scored as a test image.
    score = dict(zip(without.scores.names, without.scores.score_I, strict=True))
    assert both.threshold.scores == pytest.approx([score[plain.name_of(used)]], abs=1e-5)
    for name, value in zip(both.scores.names, both.scores.score_I, strict=True):
        assert value == pytest.approx(score[name], abs=1e-5)
    with pytest.raises(DataError, match=r"4 normal images .* 2 shots and 3 more"):
        evaluate(plain, backbone=backbone, shots=2, seeds=(0,), settings=settings, calibration=3)


def test_copies_of_good_images_are_neither_learned_from_nor_tested(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    plain = _plain_category(tmp_path, category)
    for path in plain.good:
        for copy in range(3):
            Image.open(path).save(path.with_name(f"{path.stem} ({copy}).bmp"))
    (found,) = find_categories(tmp_path)
    assert len(found.good) == 16
    settings = QUICK.model_copy(update={"false_alarm_rate": 0.3})
    *_, both = evaluate(
        found, backbone=backbone, shots=2, seeds=(0,), settings=settings, calibration=1
    )
    assert both.threshold is not None
    assert len(both.threshold.scores) == 1
    assert not both.threshold.certified
    assert both.scores.defect_types.count("good") == 1
    assert len(both.scores.names) == 3
    copies = both.as_dict()["copies"]
    assert isinstance(copies, tuple)
    assert copies
    assert all(copy.split(".")[0][:3] == first[:3] for copy, first in copies)


def test_large_images_take_no_more_memory_than_a_few_of_them(tmp_path: Path) -> None:
    side, images = 1500, 32
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (tmp_path / folder).mkdir(parents=True)
    mask = Image.new("L", (side, side))
    mask.paste(255, (100, 200, 300, 230))
    for i in range(images):
        Image.new("L", (side, side), i).save(
            tmp_path / "test" / ("good", "hole")[i % 2] / f"{i}.png"
        )
        mask.save(tmp_path / "ground_truth/hole" / f"{i}.png")
    Image.new("L", (side, side)).save(tmp_path / "train/good/0.png")
    (category,) = find_categories(tmp_path)
    test = TestSet.read(category)
    tracemalloc.start()
    try:
        result = test.result(
            lambda places: (torch.rand(len(places), 24, 24), torch.rand(len(places))),
            variant="both",
            support=(),
            seed=0,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * side**2 * images / 2
    assert result.aupro is not None
    assert result.scores.anomalous_IH is not None
    assert result.scores.anomalous_IH.sum() == images / 2 * 200 * 30


def test_a_mask_of_another_size_is_named(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    _plain_category(tmp_path, category)
    folder = tmp_path / category.name / "ground_truth" / "defective"
    folder.mkdir(parents=True)
    for path in (tmp_path / category.name / "defective").iterdir():
        Image.new("L", (7, 5), 255).save(folder / f"{path.stem}_mask.png")
    (with_masks,) = find_categories(tmp_path)
    with pytest.raises(DataError, match=r"_mask\.png is 7 x 5"):
        evaluate(with_masks, backbone=backbone, shots=2, seeds=(0,), settings=QUICK)


def _with_masks(root: Path, category: Category, *masks: Image.Image) -> Category:
    """Its two defective images have these masks, enlarged to their size."""
    plain = _plain_category(root, category)
    folder = root / category.name / "ground_truth" / "defective"
    folder.mkdir(parents=True)
    for image, mask in zip(plain.test, masks, strict=False):
        mask.resize(read_image(image.path).size).save(folder / f"{image.path.stem}_mask.png")
    (found,) = find_categories(root)
    return found


def test_masks_that_are_most_likely_inverted_are_refused(
    category: Category, tmp_path: Path
) -> None:
    usual, inverted = Image.new("L", (10, 10)), Image.new("L", (10, 10), 255)
    usual.putpixel((5, 5), 255)
    inverted.putpixel((5, 5), 0)
    message = rf"every mask of {category.name}, such as .*_mask\.png, marks more .*: invert them"
    with pytest.raises(DataError, match=message):
        TestSet.read(_with_masks(tmp_path / "all", category, inverted, inverted))
    found = TestSet.read(_with_masks(tmp_path / "one", category, inverted, usual))
    assert found.masks is not None
    assert [mask.mean() > 0.5 for mask in (found.masks[0], found.masks[1])] == [True, False]


def test_a_mask_without_paint_is_named(category: Category, tmp_path: Path) -> None:
    white, black = Image.new("L", (10, 10), 255), Image.new("L", (10, 10))
    found = _with_masks(tmp_path, category, white, black)
    with pytest.raises(DataError, match=f"nothing is painted in the mask {found.test[1].mask},"):
        TestSet.read(found)


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,)])
def test_odd_seeds_are_refused(
    backbone: FrozenCLIP, category: Category, seeds: tuple[int, ...]
) -> None:
    with pytest.raises(SettingsError, match="seed"):
        evaluate(category, backbone=backbone, shots=1, seeds=seeds, settings=QUICK)


def test_a_category_without_test_images_is_refused(
    backbone: FrozenCLIP, category: Category, tmp_path: Path
) -> None:
    Image.open(category.good[0]).save(tmp_path / "one.png")
    (only_good,) = find_categories(tmp_path)
    with pytest.raises(DataError, match="needs good and defective test images"):
        evaluate(only_good, backbone=backbone, shots=1, seeds=(0,), settings=QUICK)


def test_the_table_gives_percent_mean_and_deviation_and_a_dash_where_nothing_exists() -> None:
    results = [
        Result(
            variant="both",
            category="tile",
            shots=4,
            seed=seed,
            image_auroc=value,
            pixel_auroc=None,
            aupro=None,
            scores=scores(seed, 1.0),
        )
        for seed, value in enumerate((0.5, 0.7))
    ]
    header, _, tile = format_table(results).splitlines()
    assert header.endswith("| good rejected | defects found |")
    assert tile == "| tile | 4 | both | 60.0 ± 14.1 | - | - | - | - |"
    others = [replace(one, category="nut", aupro=0.4, threshold=NEVER) for one in results]
    *_, mean = format_table(results + others).splitlines()
    # Only one of the two has a threshold, and AUPRO.
    figures = "60.0 ± 14.1 | - | 40.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0"
    assert mean == f"| mean of 2 | 4 | both | {figures} |"


def test_real_images_go_through(backbone: FrozenCLIP, real_data: Path) -> None:
    """Gray images of many sizes; a few of each kind, since every one takes its time."""
    (tile,) = find_categories(real_data, ["magnetic_tile"])
    good = [image for image in tile.test if not image.is_anomalous][:5]
    bad = [image for image in tile.test if image.defect_type == "blowhole"][:5]
    few = Category(name=tile.name, root=tile.root, good=tile.good, test=(*good, *bad))
    (prompts, reference, both) = evaluate(
        few, backbone=backbone, shots=2, seeds=(0,), settings=QUICK
    )
    assert {prompts.variant, reference.variant, both.variant} == {"prompts", "reference", "both"}
    assert both.aupro is not None
