"""Images to pixels as encoders take them, and back.

B images, H, W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def to_pixels(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """RGB images of any size -> pixels `(B, 3, size, size)`, float32 in 0..1.

    The whole image is resized (bicubic, antialiased); nothing is cropped.
    """
    stacked_BHW3 = np.stack(
        [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    )
    return torch.from_numpy(stacked_BHW3).permute(0, 3, 1, 2).float().div_(255)


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
