"""Images to pixels as encoders take them, and back.

B images, H, W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from apt_ray.tensors import is_traced

_ONE, _HALF = 1 << 22, 1 << 11  # of Pillow's weights: their unit, and half of its bits
_BLOCK = 16


def to_pixels(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """RGB images of any size -> pixels `(B, 3, size, size)`, float32 in 0..1.

    The whole image is resized (bicubic, antialiased); nothing is cropped.
    """
    levels_BHW3 = np.stack([to_levels(image, (size, size)) for image in images])
    return from_levels(torch.from_numpy(levels_BHW3))


def to_levels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels `(H, W, 3)` of an RGB image at `size` = (width, height), before they are numbers
    in 0..1: a quarter of the bytes, for those who send them elsewhere."""
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def from_levels(levels_BHW3: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)`, float32 in 0..1, of uint8 ones of `to_levels`."""
    return levels_BHW3.permute(0, 3, 1, 2).float().div_(255)


def to_pixels_in_graph(levels_B3HW: torch.Tensor, size: int) -> torch.Tensor:
    """`to_pixels` of images of one size as tensors: levels 0..255, float32; to the last bit.

    As Pillow does it: along the width, then along the height, whole levels after each.
    """
    if levels_B3HW.shape[-1] != size:
        levels_B3HW = _resize_rows(levels_B3HW, size)
    if levels_B3HW.shape[-2] != size:
        levels_B3HW = _resize_rows(levels_B3HW.mT, size).mT
    return levels_B3HW / 255


def _resize_rows(levels_XL: torch.Tensor, size: int) -> torch.Tensor:
    """Levels 0..255 along the last axis at another length.

    Pillow multiplies with integers of 22 bits, and what it rounds often lies in the middle between
    two levels. In float32 only halves of so many bits add up exactly.
    """
    weights_LS = _resampling(levels_XL.shape[-1], size, one=_ONE)
    coarse_LS = (weights_LS + _HALF // 2) // _HALF
    halves = np.stack([coarse_LS, weights_LS - coarse_LS * _HALF]).astype(np.float32)
    parts = []
    # An output pixel sees a few input pixels: most of the matrix is empty.
    for start in range(0, size, _BLOCK):
        block = halves[..., start : start + _BLOCK]
        seen = np.flatnonzero(block.any(axis=(0, 2)))
        first, last = int(seen[0]), int(seen[-1]) + 1
        both = torch.from_numpy(np.concatenate([*block[:, first:last]], axis=-1))
        parts.append((levels_XL[..., first:last] @ both).unflatten(-1, (2, -1)))
    coarse, fine = torch.cat(parts, -1).unbind(-2)
    coarse = coarse + _HALF / 2
    whole = (coarse / _HALF).floor()
    rest = coarse - whole * _HALF + fine / _HALF
    return (whole + (rest / _HALF).floor()).clamp(0, 255)


def _resample(x_B3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic, antialiased resizing of squares, as products with matrices alone."""
    one = 1 << 30
    weights_LS = torch.from_numpy(
        (_resampling(x_B3HW.shape[-1], size, one=one) / one).astype(np.float32)
    )
    # In this order: OpenVINO 2026.4 cannot scale the channels of what a matrix on the right gives.
    return weights_LS.T.contiguous() @ (x_B3HW @ weights_LS)


def _resampling(length: int, size: int, *, one: int) -> NDArray[np.int32]:
    """What Pillow makes of each pixel of a row of so many, `(length, size)`, of values of `one`."""
    each = Image.fromarray(np.eye(length, dtype=np.int32) * np.int32(one))
    return np.array(each.resize((size, length), Image.Resampling.BICUBIC))


def to_image(pixels_3HW: torch.Tensor) -> Image.Image:
    """Pixels `(3, H, W)` in 0..1, on the CPU -> an RGB image of 8 bits."""
    levels_HW3 = (pixels_3HW * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels_HW3.numpy())


def resize_pixels(pixels_B3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Square pixels in 0..1 at another size (bicubic, antialiased); as they are at their own."""
    if pixels_B3HW.shape[-1] == size:
        return pixels_B3HW
    if is_traced():  # runtimes have no such interpolation, or one of their own
        return _resample(pixels_B3HW, size).clamp(0, 1)
    return F.interpolate(
        pixels_B3HW, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
