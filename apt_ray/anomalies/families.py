"""Perturbation families, which no prompt learns from: each replaces the pixels of a region.

`GUIDANCE` decides whether the meta-prompt may follow the learned prompts, `SELECTION` scores a
trial: it resembles defects of products, at strengths down to the edge of what can be seen. The two
share no renderer with the noise or with one another.

B images, H, W pixels. Pixels are float32 in 0..1. All functions draw from the generator that they
are given, on the CPU.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from apt_ray.anomalies.noise import keep_gray
from apt_ray.anomalies.regions import (
    blob,
    coordinates,
    ellipse,
    polyline,
    smooth_noise,
    uniform,
    walk,
)

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


def _gaussian_blur(pixels_BCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    height, width = _size(pixels_BCHW)
    return _blurring(height, sigma) @ pixels_BCHW @ _blurring(width, sigma).T


@lru_cache(maxsize=16)
def _blurring(size: int, sigma: float) -> torch.Tensor:
    """One axis of a Gaussian blur as a matrix `(size, size)`, the edge mirrored: on a CPU far
    faster than convolutions of so many taps."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    padded = F.pad(torch.eye(size)[None], (radius, radius), mode="reflect")
    return F.conv1d(padded.transpose(0, 1), (kernel / kernel.sum())[None, None])[:, 0].T


def _displace(pixels_B3HW: torch.Tensor, shift_BHW2: torch.Tensor) -> torch.Tensor:
    """Pixels read at their own place plus `shift_BHW2` (x, y), in units of half an image."""
    height, width = _size(pixels_B3HW)
    y_H1, x_W = coordinates((height, width))
    own_HW2 = torch.stack([(2 * x_W - 1).expand(height, -1), (2 * y_H1 - 1).expand(-1, width)], -1)
    return F.grid_sample(
        pixels_B3HW, own_HW2 + shift_BHW2, padding_mode="reflection", align_corners=False
    )


def _soft(mask_BHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """A mask with an edge of `sigma` of the image's side, `(B, 1, H, W)` in 0..1."""
    return _gaussian_blur(mask_BHW[:, None].float(), sigma * mask_BHW.shape[-1])


def _fade_in(pixels: torch.Tensor, replacement: torch.Tensor, share: torch.Tensor) -> Perturbed:
    """The replacement laid over the pixels, by its share at each pixel, 0..1."""
    mixed = torch.lerp(pixels, keep_gray(pixels, replacement.clamp(0, 1)), share)
    return Perturbed(mixed, (mixed - pixels).abs().amax(1) > VISIBLE_CHANGE)


def _elsewhere(pixels: torch.Tensor, least: float, g: torch.Generator) -> torch.Tensor:
    """The images shifted by at least so much, in units of half an image."""
    batch, size = len(pixels), _size(pixels)
    angle_B = uniform(0, 2 * math.pi, (batch,), g)
    shift_B2 = uniform(least, 1.2, (batch, 1), g) * torch.stack([angle_B.cos(), angle_B.sin()], -1)
    return _displace(pixels, shift_B2[:, None, None].expand(batch, *size, 2))


def _sign(batch: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(2, (batch, 1, 1, 1), generator=g) * 2.0 - 1


def cut_and_paste(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A piece from elsewhere in the same image with a hard edge, as in CutPaste (arXiv
    2104.04015)."""
    return _blend(pixels, _elsewhere(pixels, 0.4, g), ellipse(len(pixels), _size(pixels), g))


def patch(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A small piece from elsewhere with a soft edge: a part doubled, or another in its place."""
    moved = _elsewhere(pixels, 0.1, g)
    return _fade_in(pixels, moved, _soft(blob(len(pixels), _size(pixels), g, (0.001, 0.01)), 0.004))


def clone(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """Structure from elsewhere in the brightness of the place, as Poisson blending gives it in NSA
    (arXiv 2109.15222)."""
    moved = _elsewhere(pixels, 0.3, g)
    sigma = 0.03 * pixels.shape[-1]
    fitted = moved - _gaussian_blur(moved, sigma) + _gaussian_blur(pixels, sigma)
    return _fade_in(
        pixels, fitted, _soft(blob(len(pixels), _size(pixels), g, (0.003, 0.03)), 0.006)
    )


def texture(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """Texture from elsewhere, half transparent, in a ragged area, after DRAEM (arXiv
    2108.07610)."""
    batch, size = len(pixels), _size(pixels)
    shift_B112 = 0.5 * torch.randn(batch, 1, 1, 2, generator=g)
    moved = _displace(pixels.roll(1, 0), shift_B112.expand(batch, *size, 2))
    area = _soft(blob(batch, size, g, (0.01, 0.05)), 0.01)
    return _fade_in(pixels, moved, area * uniform(0.15, 0.6, (batch, 1, 1, 1), g))


def crack(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A thin, dark, jagged line."""
    batch = len(pixels)
    line = walk(batch, _size(pixels), g, width=(0.0015, 0.004), turn=0.9, length=(0.03, 0.12))
    darker = pixels - uniform(0.08, 0.3, (batch, 1, 1, 1), g)
    return _fade_in(pixels, darker, _soft(line, 0.0015))


def hairline(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A fine scratch, nearly straight, lighter or darker than what lies under it."""
    batch = len(pixels)
    line = walk(batch, _size(pixels), g, width=(0.001, 0.003), turn=0.3, length=(0.05, 0.15))
    moved = pixels + _sign(batch, g) * uniform(0.08, 0.3, (batch, 1, 1, 1), g)
    return _fade_in(pixels, moved, _soft(line, 0.001))


def scratch(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A broad line, lighter or darker than what lies under it."""
    batch = len(pixels)
    moved = pixels + _sign(batch, g) * uniform(0.06, 0.3, (batch, 1, 1, 1), g)
    return _blend(pixels, moved, polyline(batch, _size(pixels), g))


def pit(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A small spot, lighter or darker."""
    batch = len(pixels)
    moved = pixels + _sign(batch, g) * uniform(0.1, 0.4, (batch, 1, 1, 1), g)
    return _fade_in(pixels, moved, _soft(blob(batch, _size(pixels), g, (0.0004, 0.003)), 0.002))


def blot(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A spot of one colour, half transparent."""
    batch = len(pixels)
    colour_B311 = uniform(0, 1, (batch, 3, 1, 1), g)
    opacity_B111 = uniform(0.15, 0.6, (batch, 1, 1, 1), g)
    return _blend(
        pixels,
        torch.lerp(pixels, colour_B311, opacity_B111),
        blob(batch, _size(pixels), g, (0.003, 0.05)),
    )


def erase(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A part that is missing: what lies around it stands in its place."""
    hole_BHW = blob(len(pixels), _size(pixels), g, (0.002, 0.02))
    kept_B1HW = (~hole_BHW)[:, None].float()
    sigma = 0.03 * pixels.shape[-1]
    known = _gaussian_blur(kept_B1HW, sigma).clamp_min(1e-3)
    grain = 0.01 * torch.randn(pixels.shape, generator=g)
    filled = _gaussian_blur(pixels * kept_B1HW, sigma) / known + grain
    return _fade_in(pixels, filled, _soft(hole_BHW, 0.003))


def tint(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place of another colour."""
    batch = len(pixels)
    shift_B311 = torch.randn(batch, 3, 1, 1, generator=g)
    shift_B311 = shift_B311 / shift_B311.norm(dim=1, keepdim=True)
    strength_B111 = uniform(0.08, 0.3, (batch, 1, 1, 1), g)
    area = _soft(blob(batch, _size(pixels), g, (0.003, 0.05)), 0.004)
    return _fade_in(pixels, pixels + strength_B111 * shift_B311, area)


def bend(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A dented place: its pixels are moved by a smooth field."""
    batch, size = len(pixels), _size(pixels)
    shift_BHW2 = 0.05 * torch.stack([smooth_noise(batch, size, 12, g) for _ in "xy"], -1)
    area_BHW1 = _soft(blob(batch, size, g, (0.004, 0.03)), 0.01)[:, 0, ..., None]
    return _fade_in(pixels, _displace(pixels, shift_BHW2 * area_BHW1), torch.ones_like(pixels))


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
    soft = _soft(ellipse(batch, size, g), 0.02)
    everywhere_BHW = torch.ones(batch, *size, dtype=torch.bool)
    return _blend(pixels, pixels + 0.35 * sign_B111 * soft, everywhere_BHW)


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
    "patch": patch,
    "clone": clone,
    "texture": texture,
    "crack": crack,
    "hairline": hairline,
    "scratch": scratch,
    "pit": pit,
    "blot": blot,
    "erase": erase,
    "tint": tint,
    "bend": bend,
}


ABOUT: Mapping[str, str] = {
    "cut_and_paste": "a piece from elsewhere with a hard edge",
    "patch": "a small piece that belongs elsewhere",
    "clone": "structure that belongs elsewhere",
    "texture": "texture that belongs elsewhere",
    "crack": "a thin, dark, jagged line",
    "hairline": "a fine scratch",
    "scratch": "a broad scratch",
    "pit": "a small spot",
    "blot": "a stain",
    "erase": "something is missing",
    "tint": "another colour",
    "bend": "a dent",
}
"""What each family of `SELECTION` looks like, for people."""


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
