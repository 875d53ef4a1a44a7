"""Regions of interest: the masks outside of which nothing counts.

Legend: H height, W width, in pixels of the mask.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apt_ray.errors import DataError
from apt_ray.images import encode_png, read_image

# Finer than any backbone's patches, and a few kilobytes as a file.
_MASK_SIDE = 256


def mask_png(path: Path) -> bytes:
    """A mask file as a small black-and-white PNG file; whatever is not black counts.

    Raises DataError if it cannot be read or is black all over.
    """
    image = read_image(path).convert("L").point(lambda value: 255 if value else 0)
    if image.getbbox() is None:
        raise DataError(f"a mask, {path}, that is black all over: paint white what counts")
    image.thumbnail((_MASK_SIDE, _MASK_SIDE), Image.Resampling.NEAREST)
    return encode_png(image.convert("1"))


def mask_of_png(data: bytes) -> NDArray[np.bool_]:
    """The mask (H, W) in a file of `mask_png`."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("L")) > 0


def mask_of_box(box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """The mask (H, W) of a box [left, top, width, height] in shares of the image."""
    left, top, width, height = (round(_MASK_SIDE * share) for share in box)
    mask_HW = np.zeros((_MASK_SIDE, _MASK_SIDE), np.bool_)
    mask_HW[top : top + max(1, height), left : left + max(1, width)] = True
    return mask_HW
