import io

import numpy as np
import pytest
import torch
from PIL import Image

from serving.replica.pictures import SMALL_MAP_SIDE, bounded, gray_png, small_map_png


@pytest.mark.parametrize(
    ("size", "side", "found"),
    [
        ((400, 300), None, (400, 300)),
        ((400, 300), 400, (400, 300)),
        ((400, 300), 100, (100, 75)),
        ((3, 4000), 100, (1, 100)),
    ],
)
def test_a_size_keeps_its_shape_within_a_bound(
    size: tuple[int, int], side: int | None, found: tuple[int, int]
) -> None:
    assert bounded(size, side) == found


def test_white_is_one_at_either_depth() -> None:
    map_HW = np.array([[0.0, 0.5, 1.0]], np.float32)
    for bits, levels in ((8, [0, 128, 255]), (16, [0, 32768, 65535])):
        with Image.open(io.BytesIO(gray_png(map_HW, bits=8 if bits == 8 else 16))) as image:
            assert np.asarray(image).tolist() == [levels]


def test_a_small_map_has_the_shape_of_its_image() -> None:
    with Image.open(io.BytesIO(small_map_png(torch.ones(8, 8), (4000, 1000)))) as image:
        assert (image.mode, image.size) == ("L", (SMALL_MAP_SIDE, SMALL_MAP_SIDE // 4))
        assert np.asarray(image).min() == 255
