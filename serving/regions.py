"""Regions of interest: the masks outside of which nothing counts.

Legend: H height, W width, in pixels of the mask.
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apt_ray.images import cover, encode_png, read_region

# Finer than any backbone's patches, and a few kilobytes as a file.
_MASK_SIDE = 256
# What adding two shares may be off by.
_ROUNDING = 1e-9


def mask_png(path: Path) -> bytes:
    """A mask file as a small black-and-white PNG file, white where `read_region` says that it
    counts. Raises DataError as that does."""
    mask_HW = read_region(path)
    height, width = (min(side, _MASK_SIDE) for side in mask_HW.shape)
    return encode_png(Image.fromarray(cover(mask_HW, (height, width))))


def mask_of_png(data: bytes) -> NDArray[np.bool_]:
    """The mask (H, W) in a file of `mask_png`."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("L")) > 0


def mask_of_box(box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """The mask (H, W) of a box [left, top, width, height] in shares of the image: all pixels that
    it touches."""
    left, top, width, height = (_MASK_SIDE * share for share in box)
    mask_HW = np.zeros((_MASK_SIDE, _MASK_SIDE), np.bool_)
    mask_HW[_touched(top, height), _touched(left, width)] = True
    return mask_HW


def _touched(start: float, length: float) -> slice:
    return slice(math.floor(start + _ROUNDING), math.ceil(start + length - _ROUNDING))
