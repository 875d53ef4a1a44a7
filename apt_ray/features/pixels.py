"""Images to pixels as encoders take them, and back.

B images, H, W pixels.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.tensors import is_traced


def to_pixels(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """RGB images of any size -> pixels `(B, 3, size, size)`, float32 in 0..1.

    The whole image is resized (bicubic, antialiased); nothing is cropped.
    """
    stacked_BHW3 = np.stack(
        [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    )
    return torch.from_numpy(stacked_BHW3).permute(0, 3, 1, 2).float().div_(255)


def to_pixels_in_graph(levels_B3HW: torch.Tensor, size: int) -> torch.Tensor:
    """`to_pixels` of images of one size as tensors: levels 0..255, float32.

    As Pillow does it: along the width, then along the height, whole levels after each.
    """
    for step in ((levels_B3HW.shape[-2], size), (size, size)):
        levels_B3HW = resample(levels_B3HW, step).add(0.5).floor().clamp(0, 255)
    return levels_B3HW / 255


def resample(x_B3HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased resizing to (height, width), as products with matrices alone."""
    (height, width), (rows, columns) = x_B3HW.shape[-2:], size
    if width != columns:
        x_B3HW = x_B3HW @ torch.from_numpy(_resampling(width, columns))
    if height != rows:
        x_B3HW = torch.from_numpy(_resampling(height, rows).T.copy()) @ x_B3HW
    return x_B3HW


@lru_cache(maxsize=8)
def _resampling(length: int, size: int) -> npt.NDArray[np.float32]:
    """What Pillow makes of each pixel of a row of so many, `(length, size)`."""
    each = Image.fromarray(np.eye(length, dtype=np.float32))
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
        return resample(pixels_B3HW, (size, size)).clamp(0, 1)
    return F.interpolate(
        pixels_B3HW, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
