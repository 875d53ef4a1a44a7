from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import SAMPLE_CATEGORIES, defect_types, draw_sample, write_samples
from apt_ray.errors import DataError, SettingsError
from apt_ray.images import read_image, read_mask

SMALL = {"good": 2, "test_good": 1, "test_defective": 5, "size": 64}
DEFECTS = [(name, defect) for name in SAMPLE_CATEGORIES for defect in defect_types(name)]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("category", "defect"), DEFECTS)
def test_masks_cover_exactly_what_a_defect_changed(category: str, defect: str) -> None:
    for seed in range(4):
        good, no_mask = draw_sample(category, seed=seed, size=128)
        defective, mask = draw_sample(category, defect, seed=seed, size=128)
        assert not no_mask.any()
        assert 20 < mask.sum() < 0.15 * mask.size
        change = np.abs(np.asarray(good, int) - np.asarray(defective, int)).max(axis=-1)
        beyond_blur = ~ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=2)
        assert change[beyond_blur].max() <= 2
        assert np.median(change[mask]) >= 8


@pytest.mark.parametrize("category", SAMPLE_CATEGORIES)
def test_good_images_differ_and_seeds_repeat(category: str) -> None:
    pictures = [np.asarray(draw_sample(category, seed=seed, size=64)[0], int) for seed in (0, 1)]
    assert pictures[0].shape == (64, 64, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() > 2
    np.testing.assert_array_equal(pictures[0], np.asarray(draw_sample(category, size=64)[0]))


def test_written_samples_are_mvtec_categories(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    folders = write_samples(
        tmp_path / "new" / "root", **SMALL, progress=lambda *step: steps.append(step)
    )
    assert steps == [(done, 24) for done in range(1, 25)]
    categories = find_categories(tmp_path / "new" / "root")
    assert {category.root for category in categories} == set(folders)
    assert {category.name for category in categories} == set(SAMPLE_CATEGORIES)
    for category in categories:
        assert len(category.good) == 2
        assert [image.is_anomalous for image in category.test].count(True) == 5
        assert {image.defect_type for image in category.test} == {
            "good",
            *defect_types(category.name),
        }
        assert category.has_masks
        for image in category.test:
            size = read_image(image.path).size
            assert size == (64, 64)
            assert image.mask is None or read_mask(image.mask, size).any()


def test_writing_is_reproducible_and_seeded(tmp_path: Path) -> None:
    runs = [
        write_samples(tmp_path / name, seed=seed, **SMALL)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for first, same, other in zip(*runs, strict=True):
        assert contents(first) == contents(same)
        image = "train/good/000.png"
        assert contents(first)[image] != contents(other)[image]


def test_no_image_is_written_twice(tmp_path: Path) -> None:
    images = [
        content
        for folder in write_samples(tmp_path, **SMALL)
        for name, content in contents(folder).items()
        if name.endswith(".png") and not name.startswith("ground_truth")
    ]
    assert len(set(images)) == len(images) == 24


def test_a_second_run_keeps_what_is_there(tmp_path: Path) -> None:
    folders = write_samples(tmp_path, **SMALL)
    before = [path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))]
    assert write_samples(tmp_path, **SMALL) == folders
    assert before == [
        path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))
    ]


def test_samples_of_other_parameters_are_refused_untouched(tmp_path: Path) -> None:
    write_samples(tmp_path, **{**SMALL, "good": 1})
    before = contents(tmp_path)
    with pytest.raises(DataError, match="remove it or choose another folder"):
        write_samples(tmp_path, **SMALL)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("category", SAMPLE_CATEGORIES)
def test_foreign_folders_are_refused_before_anything_is_written(
    tmp_path: Path, category: str
) -> None:
    (tmp_path / category).mkdir()
    (tmp_path / category / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="remove it or choose another folder"):
        write_samples(tmp_path, **SMALL)
    assert contents(tmp_path) == {f"{category}/mine.txt": b"precious"}


def test_empty_folders_are_filled(tmp_path: Path) -> None:
    (tmp_path / "textile").mkdir()
    write_samples(tmp_path, **SMALL)
    assert (tmp_path / "textile" / "train").is_dir()


def test_a_broken_run_leaves_whole_categories_only(tmp_path: Path) -> None:
    def stop_midway(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, **SMALL, progress=stop_midway)
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLE_CATEGORIES[0]]
    write_samples(tmp_path, **SMALL)
    assert len(find_categories(tmp_path)) == len(SAMPLE_CATEGORIES)


@pytest.mark.parametrize("wrong", [{"good": 0}, {"test_good": -1}, {"seed": -1}, {"size": 8}])
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="samples need"):
        write_samples(tmp_path, **wrong)


def test_unknown_names() -> None:
    with pytest.raises(SettingsError, match="washer, textile, blister"):
        draw_sample("spoon")
    with pytest.raises(SettingsError, match="only nick, rust, scratch"):
        draw_sample("washer", "hole")
