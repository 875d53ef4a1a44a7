"""Perturbation families, which no prompt learns from: each replaces the pixels of a region.

`GUIDANCE` decides whether the meta-prompt may follow the learned prompts, `SELECTION` scores a
trial. The two share no renderer with the noise or with one another.

B images, H, W pixels. Pixels are float32 in 0..1. All functions draw from the generator that they
are given, on the CPU.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from apt_ray.anomalies.noise import keep_gray
from apt_ray.anomalies.regions import blob, coordinates, ellipse, polyline, smooth_noise, uniform

VISIBLE_CHANGE = 0.03
"""A pixel counts as changed if a channel moved by more than this: about 8 of 255 gray levels."""


class Perturbed(NamedTuple):
    """Perturbed pixels `(B, 3, H, W)` in 0..1 and the mask `(B, H, W)` of pixels that changed."""

    pixels_B3HW: torch.Tensor
    mask_BHW: torch.Tensor


def _blend(pixels: torch.Tensor, replacement: torch.Tensor, mask_BHW: torch.Tensor) -> Perturbed:
    replacement = keep_gray(pixels, replacement)
    blended = torch.where(mask_BHW[:, None], replacement.clamp(0, 1), pixels)
    changed_BHW = (blended - pixels).abs().amax(1) > VISIBLE_CHANGE
    return Perturbed(blended, changed_BHW)


def _size(pixels_B3HW: torch.Tensor) -> tuple[int, int]:
    return pixels_B3HW.shape[-2], pixels_B3HW.shape[-1]


def _gaussian_blur(pixels_B3HW: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels_B3HW, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _displace(pixels_B3HW: torch.Tensor, shift_BHW2: torch.Tensor) -> torch.Tensor:
    """Pixels read at their own place plus `shift_BHW2` (x, y), in units of half an image."""
    height, width = _size(pixels_B3HW)
    y_H1, x_W = coordinates((height, width))
    own_HW2 = torch.stack([(2 * x_W - 1).expand(height, -1), (2 * y_H1 - 1).expand(-1, width)], -1)
    return F.grid_sample(
        pixels_B3HW, own_HW2 + shift_BHW2, padding_mode="reflection", align_corners=False
    )


def cut_and_paste(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A piece from elsewhere in the same image."""
    batch, size = len(pixels), _size(pixels)
    angle_B = uniform(0, 2 * math.pi, (batch,), g)
    shift_B2 = uniform(0.4, 1.2, (batch, 1), g) * torch.stack([angle_B.cos(), angle_B.sin()], -1)
    moved = _displace(pixels, shift_B2[:, None, None].expand(batch, *size, 2))
    return _blend(pixels, moved, ellipse(batch, size, g))


def scratch(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A thin line, lighter or darker than what lies under it."""
    batch = len(pixels)
    sign_B111 = torch.randint(2, (batch, 1, 1, 1), generator=g) * 2.0 - 1
    moved = pixels + sign_B111 * uniform(0.15, 0.5, (batch, 1, 1, 1), g)
    return _blend(pixels, moved, polyline(batch, _size(pixels), g))


def blot(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A spot of one colour, half transparent."""
    batch = len(pixels)
    colour_B311 = uniform(0, 1, (batch, 3, 1, 1), g)
    opacity_B111 = uniform(0.4, 0.9, (batch, 1, 1, 1), g)
    return _blend(
        pixels, torch.lerp(pixels, colour_B311, opacity_B111), blob(batch, _size(pixels), g)
    )


def erase(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A part that is missing: the image's own median colour stands in its place."""
    median_B311 = pixels.flatten(2).median(-1).values[..., None, None]
    grain = 0.02 * torch.randn(pixels.shape, generator=g)
    return _blend(pixels, median_B311 + grain, blob(len(pixels), _size(pixels), g))


def blur(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A smeared place."""
    sigma = 0.025 * pixels.shape[-1]
    return _blend(pixels, _gaussian_blur(pixels, sigma), ellipse(len(pixels), _size(pixels), g))


def colour_shift(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place of another tint."""
    batch = len(pixels)
    shift_B311 = torch.randn(batch, 3, 1, 1, generator=g)
    shift_B311 = 0.3 * shift_B311 / shift_B311.norm(dim=1, keepdim=True)
    return _blend(pixels, pixels + shift_B311, ellipse(batch, _size(pixels), g))


def warp(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A dented place: its pixels are moved by a smooth field."""
    batch, size = len(pixels), _size(pixels)
    shift_BHW2 = 0.12 * torch.stack([smooth_noise(batch, size, 10, g) for _ in "xy"], -1)
    return _blend(pixels, _displace(pixels, shift_BHW2), blob(batch, size, g))


def speckle(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """Black and white grains."""
    batch, size = len(pixels), _size(pixels)
    value_B1HW = torch.rand(batch, 1, *size, generator=g)
    grains = torch.where(value_B1HW < 0.2, 0.0, torch.where(value_B1HW > 0.8, 1.0, pixels))
    return _blend(pixels, grains, blob(batch, size, g))


def stripes(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A periodic pattern laid over the surface."""
    batch, size = len(pixels), _size(pixels)
    y_H1, x_W = coordinates(size)
    angle_B11 = uniform(0, math.pi, (batch, 1, 1), g)
    cycles_B11 = uniform(12, 30, (batch, 1, 1), g)
    phase_BHW = cycles_B11 * (angle_B11.cos() * x_W + angle_B11.sin() * y_H1)
    wave_B1HW = torch.sin(2 * math.pi * phase_BHW)[:, None]
    return _blend(pixels, pixels + 0.25 * wave_B1HW, ellipse(batch, size, g))


def shade(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A lighter or darker place with a soft edge."""
    batch, size = len(pixels), _size(pixels)
    sign_B111 = torch.randint(2, (batch, 1, 1, 1), generator=g) * 2.0 - 1
    mask_B3HW = ellipse(batch, size, g)[:, None].float().expand(-1, 3, -1, -1)
    soft_B3HW = _gaussian_blur(mask_B3HW, 0.02 * size[1])
    everywhere_BHW = torch.ones(batch, *size, dtype=torch.bool)
    return _blend(pixels, pixels + 0.35 * sign_B111 * soft_B3HW, everywhere_BHW)


def fade(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place that lost its contrast."""
    coarse = _gaussian_blur(pixels, 0.06 * pixels.shape[-1])
    return _blend(pixels, coarse, blob(len(pixels), _size(pixels), g))


def shuffle(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place whose pixels were mixed up."""
    batch, size = len(pixels), _size(pixels)
    shift_BHW2 = 0.25 * torch.randn(batch, *size, 2, generator=g)
    return _blend(pixels, _displace(pixels, shift_BHW2), ellipse(batch, size, g))


Family = Callable[[torch.Tensor, torch.Generator], Perturbed]


GUIDANCE: Mapping[str, Family] = {
    "speckle": speckle,
    "stripes": stripes,
    "shade": shade,
    "fade": fade,
    "shuffle": shuffle,
}


SELECTION: Mapping[str, Family] = {
    "cut_and_paste": cut_and_paste,
    "scratch": scratch,
    "blot": blot,
    "erase": erase,
    "blur": blur,
    "colour_shift": colour_shift,
    "warp": warp,
}


def harmless_copies(pixels: torch.Tensor, copies: int, g: torch.Generator) -> torch.Tensor:
    """`copies` of each image, slightly turned, enlarged, shifted and relit: still normal.

    Args:
        pixels: `(B, 3, H, W)`.

    Returns:
        `(B * copies, 3, H, W)`, the copies of one image side by side.
    """
    repeated = pixels.repeat_interleave(copies, 0)
    batch, size = len(repeated), _size(repeated)
    angle_B = uniform(-0.09, 0.09, (batch,), g)
    zoom_B = uniform(0.88, 0.98, (batch,), g)
    move_B2 = uniform(-0.04, 0.04, (batch, 2), g)
    cos_B, sin_B = zoom_B * angle_B.cos(), zoom_B * angle_B.sin()
    affine_B23 = torch.stack(
        [
            torch.stack([cos_B, -sin_B, move_B2[:, 0]], -1),
            torch.stack([sin_B, cos_B, move_B2[:, 1]], -1),
        ],
        1,
    )
    grid = F.affine_grid(affine_B23, [batch, 3, *size], align_corners=False)
    turned = F.grid_sample(repeated, grid, padding_mode="reflection", align_corners=False)
    gain_B111 = uniform(0.94, 1.06, (batch, 1, 1, 1), g)
    return (gain_B111 * turned).clamp(0, 1)
