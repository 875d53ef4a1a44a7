"""Images to pixels as encoders take them, and back.

B images, H, W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image


def to_pixels(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """RGB images of any size -> pixels `(B, 3, size, size)`, float32 in 0..1.

    The whole image is resized (bicubic, antialiased); nothing is cropped.
    """
    return from_levels(torch.from_numpy(np.stack([to_levels(image, size) for image in images])))


def to_levels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The pixels `(size, size, 3)` of an RGB image before they are numbers in 0..1: a quarter of
    the bytes, for those who send them elsewhere."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def from_levels(levels_BHW3: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)`, float32 in 0..1, of uint8 ones of `to_levels`."""
    return levels_BHW3.permute(0, 3, 1, 2).float().div_(255)


def to_image(pixels_3HW: torch.Tensor) -> Image.Image:
    """Pixels `(3, H, W)` in 0..1, on the CPU -> an RGB image of 8 bits."""
    levels_HW3 = (pixels_3HW * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels_HW3.numpy())


def resize_pixels(pixels_B3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Square pixels in 0..1 at another size (bicubic, antialiased); as they are at their own."""
    if pixels_B3HW.shape[-1] == size:
        return pixels_B3HW
    return F.interpolate(
        pixels_B3HW, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
