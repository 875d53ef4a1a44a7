from pathlib import Path

import pytest
from PIL import Image

from apt_ray.data.distinct import Distinct, describe_copies, pixel_digest
from apt_ray.images import read_image


def test_pixels_tell_images_apart_whatever_the_files(tmp_path: Path) -> None:
    image = Image.radial_gradient("L").resize((20, 30)).convert("RGB")
    files = ("a.png", "b.bmp", "c.tif", "d.webp", "e.png")
    for file in files:
        options = {"lossless": True} if file == "d.webp" else {}
        image.save(tmp_path / file, **options)
    image.save(tmp_path / "e.png", compress_level=0, dpi=(72, 72))
    digests = {pixel_digest(read_image(tmp_path / file)) for file in files}
    assert len(digests) == 1
    image.putpixel((0, 0), (1, 2, 3))
    assert pixel_digest(image) not in digests


def test_pixels_in_another_order_are_another_image() -> None:
    assert pixel_digest(Image.new("RGB", (2, 6))) != pixel_digest(Image.new("RGB", (6, 2)))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "1 image is a copy by the pixels and left out: 1.png of 0.png"),
        (5, "5 images are copies by the pixels and left out: 1.png of 0.png, 2.png of 0.png,"),
    ],
)
def test_copies_are_named(count: int, text: str) -> None:
    distinct = Distinct()
    admitted = [distinct.admit(f"some/{place}.png", "same") for place in range(count + 1)]
    assert admitted == [True] + [False] * count
    assert len(distinct.copies) == count
    assert describe_copies(distinct.copies).startswith(text)
    assert bool(text) == bool(describe_copies(distinct.copies))
