"""The sample factory: made-up product images with exact ground truth, in the MVTec AD layout."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apt_ray.data.folders import GOOD
from apt_ray.data.samples.board import Board
from apt_ray.data.samples.products import Blister, Product, Textile, Washer
from apt_ray.errors import DataError, SettingsError
from apt_ray.files import write_json, writing

_PRODUCTS: dict[str, type[Product]] = {"washer": Washer, "textile": Textile, "blister": Blister}
SAMPLE_CATEGORIES: tuple[str, ...] = tuple(_PRODUCTS)

_MANIFEST = "samples.json"
# Raise it when the images change: folders of an older edition are then refused, not reused.
_EDITION = 1


def defect_types(category: str) -> tuple[str, ...]:
    """The kinds of defect that the samples of a category can have."""
    return _product(category).DEFECTS


def draw_sample(
    category: str, defect_type: str = GOOD, *, seed: int = 0, size: int = 192
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """An RGB image of `size` pixels square and its ground-truth mask (H, W).

    The same seed shows the same product under the same light whatever its defect.
    """
    product_class = _product(category)
    if defect_type not in (GOOD, *product_class.DEFECTS):
        raise SettingsError(
            f"{category} has no defect {defect_type!r}, only {', '.join(product_class.DEFECTS)}"
        )
    product_rng, defect_rng, camera_rng = np.random.default_rng(seed).spawn(3)
    board = Board.blank(product_rng, size)
    product = product_class(board)
    board.rng = defect_rng
    if defect_type != GOOD:
        getattr(product, defect_type)()
    return board.photograph(camera_rng)


def write_samples(
    root: Path,
    *,
    seed: int = 0,
    good: int = 23,
    test_good: int = 10,
    test_defective: int = 12,
    size: int = 192,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes `root/<category>` for each sample category and returns these folders.

    Each gets `good` training images, `test_good` good and `test_defective` defective test images
    with masks; the defect types take turns. A category appears whole or not at all. One that is
    there already with the same parameters is kept; any other non-empty folder of that name is a
    DataError, and WriteError says that it cannot be written. `progress(done, total)` counts images.
    """
    if min(good, test_good, test_defective, seed) < 0 or good < 1 or size < 32:
        raise SettingsError(
            "samples need good >= 1, test_good, test_defective, seed >= 0 and size >= 32; got "
            f"good={good}, test_good={test_good}, test_defective={test_defective}, "
            f"seed={seed}, size={size}"
        )
    manifest = {
        "made_by": "apt_ray.data.samples.factory",
        "edition": _EDITION,
        "seed": seed,
        "good": good,
        "test_good": test_good,
        "test_defective": test_defective,
        "size": size,
    }
    folders = [root / category for category in SAMPLE_CATEGORIES]
    missing = [folder for folder in folders if not _is_written(folder, manifest)]
    total = len(missing) * (good + test_good + test_defective)
    done = 0
    for folder in missing:
        with writing(folder) as staged:
            for index, (split, defect_type) in enumerate(
                _plan(folder.name, good, test_good, test_defective)
            ):
                entropy = (seed, SAMPLE_CATEGORIES.index(folder.name), index)
                image_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
                image, mask_HW = draw_sample(folder.name, defect_type, seed=image_seed, size=size)
                _save(image, staged / split / defect_type / f"{index:03d}.png")
                if defect_type != GOOD:
                    truth = staged / "ground_truth" / defect_type / f"{index:03d}_mask.png"
                    _save(Image.fromarray(mask_HW), truth)
                done += 1
                progress(done, total)
            write_json(staged / _MANIFEST, manifest)
    return folders


def _product(category: str) -> type[Product]:
    if category not in _PRODUCTS:
        raise SettingsError(
            f"there is no sample category {category!r}, only {', '.join(_PRODUCTS)}"
        )
    return _PRODUCTS[category]


def _plan(category: str, good: int, test_good: int, test_defective: int) -> list[tuple[str, str]]:
    """Split and defect type of each image; its place in the list is its name."""
    types = defect_types(category)
    defective = [("test", types[index % len(types)]) for index in range(test_defective)]
    return [("train", GOOD)] * good + [("test", GOOD)] * test_good + defective


def _is_written(folder: Path, manifest: dict[str, object]) -> bool:
    """Whether the folder holds these very samples; DataError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        if json.loads((folder / _MANIFEST).read_text()) == manifest:
            return True
    except (OSError, ValueError):
        pass  # not made here
    raise DataError(
        f"{folder} holds something other than these samples: remove it or choose another folder"
    )


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
