"""Pictures that replicas answer with or keep: their sizes, and maps as gray PNG files.

S pixels a side of a map; H, W pixels of a picture.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from apt_ray.detection.rule import resize_map
from apt_ray.images import encode_png

SMALL_MAP_SIDE = 256
"""Pixels of the longer side of a map that is kept or told beside others."""


def bounded(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """A size of the same shape whose longer side is no longer than `side`."""
    longer = max(size)
    if side is None or longer <= side:
        return size
    width, height = (max(1, round(each * side / longer)) for each in size)
    return width, height


def gray_png(map_HW: NDArray[np.float32], *, bits: Literal[8, 16]) -> bytes:
    """A map of values in 0..1 as a gray PNG file, white being 1."""
    values_HW = np.rint((2**bits - 1) * map_HW).astype(np.uint8 if bits == 8 else np.uint16)
    return encode_png(Image.fromarray(values_HW))


def small_map_png(map_SS: torch.Tensor, size: tuple[int, int]) -> bytes:
    """A map as a small 8-bit PNG file of the shape of an image of `size` = (width, height)."""
    return gray_png(resize_map(map_SS, bounded(size, SMALL_MAP_SIDE)).numpy(), bits=8)
