"""What a fleet file's region of interest leaves to count: partly inside is inside."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from apt_ray.errors import DataError
from serving.regions import mask_of_box, mask_of_png, mask_png
from serving.settings import RegionOfInterest


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("start", [0, 1, 2009, 2010, 2012, 4083])
def test_a_thin_seam_is_never_lost(tmp_path: Path, start: int, axis: int) -> None:
    seam = np.zeros((4096, 4096), np.bool_)
    seam[start : start + 12] = True
    path = tmp_path / "seam.png"
    Image.fromarray(seam if axis == 0 else seam.T).save(path)
    mask_HW = mask_of_png(mask_png(path))
    assert max(mask_HW.shape) <= 256
    assert 1 <= mask_HW.any(axis=1 - axis).sum() <= 2
    assert mask_HW.any(axis=axis).all()


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0.999, 0, 0.001, 1), 256),
        ((0, 0.5, 1, 1e-6), 256),
        ((0.25, 0.25, 0.5, 0.5), 128 * 128),
        ((0.1, 0.7, 0.2, 0.1), (77 - 25) * (205 - 179)),
        ((0, 0, 1, 1), 256 * 256),
    ],
)
def test_every_pixel_that_a_box_touches_counts(
    box: tuple[float, float, float, float], pixels: int
) -> None:
    assert mask_of_box(box).sum() == pixels
    assert RegionOfInterest(box=box).share == pixels / 256**2


def test_a_small_mask_is_kept_as_it_is(tmp_path: Path) -> None:
    mask_HW = np.eye(7, 300, dtype=np.bool_)
    path = tmp_path / "mask.png"
    Image.fromarray(mask_HW).save(path)
    kept_HW = mask_of_png(mask_png(path))
    assert kept_HW.shape == (7, 256)
    assert (kept_HW.any(axis=1)).all()


def _png(mask_HW: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "region",
    [
        {"box": (1.0, 0.0, 1e-300, 1.0)},
        {"mask_png": _png(np.zeros((4, 4), np.bool_))},
        {"mask_png": "AAAA"},
        {"mask_png": "no base64"},
    ],
)
def test_a_region_that_leaves_nothing_is_refused(region: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"make it larger|mask_png is"):
        RegionOfInterest.model_validate(region)


def test_a_black_mask_is_refused_where_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (40, 30)).save(path)
    with pytest.raises(DataError, match=r"mask\.png leaves nothing .*: paint white what counts"):
        RegionOfInterest(mask="mask.png").with_mask_read(tmp_path)
