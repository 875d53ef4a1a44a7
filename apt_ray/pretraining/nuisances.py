"""Harmless variation, labelled normal: dirt before the defects, light and sensor after them.

How much there is belongs to the style, so that the reference of a pair shows it too; where it lies
belongs to each picture. Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import fractal, noise, per_image, pixel_grid, step


def add_dirt(style: Draws, pose: Draws, image_B3HW: Tensor) -> Tensor:
    """Dust all over, soft blots, faint streaks and wide smudges."""
    x, y = pixel_grid(len(style), image_B3HW.shape[-1], image_B3HW.device)
    dusty, smudged = per_image(style.chance(0.3)), per_image(style.chance(0.35))
    polarity = per_image(style.sign())
    dust = step(noise(pose, x / 2.5, y / 2.5), 0.88, 0.97)
    dust = dust * dusty * per_image(style.uniform(low=0.05, high=0.2))
    smudge = step(fractal(pose, x / 24, y / 24, octaves=3), 0.0, 0.5)
    smudge = smudge * smudged * per_image(style.uniform(low=0.04, high=0.14))
    blot = step(noise(pose, x / 9, y / 9), 0.72, 1.0)
    blot = blot * per_image(style.chance(0.3)) * per_image(style.uniform(low=0.08, high=0.35))
    angle = per_image(style.uniform(high=math.pi))
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    wipe = step(noise(pose, along / 45 + 7, across / 2.5), 0.7, 1.0)
    wipe = wipe * per_image(style.chance(0.25)) * per_image(style.uniform(low=0.03, high=0.14))
    # One good part is dirtier than another.
    dirt = (dust + smudge + blot + wipe) * per_image(pose.uniform(low=0.3, high=1.5))
    return (image_B3HW + (polarity * dirt)[:, None]).clamp(0, 1)


def cut_off(
    style: Draws, pose: Draws, image_B3HW: Tensor, part_BHW: Tensor
) -> tuple[Tensor, Tensor]:
    """The pictures, in a fifth of the styles with the part's rough outline near some sides and
    something else behind it; and what is left of the part."""
    index = style.chance(0.2).nonzero()[:, 0]
    style, pose = style.take(index).fork(0), pose.take(index).fork(0)
    size = image_B3HW.shape[-1]
    x, y = pixel_grid(len(style), size, image_B3HW.device)
    wobble = fractal(pose, x / 7, y / 7, octaves=2) * per_image(style.uniform(high=3.0))
    beyond = torch.full_like(x, -99.0)
    for distance in (x, -x, y, -y):
        inset = style.uniform(low=0.01, high=0.12) + 0.03 * pose.normal()
        reach = distance - size * (0.5 - per_image(inset))
        beyond = torch.where(per_image(style.chance(0.4)), torch.maximum(beyond, reach), beyond)
    beyond = beyond + wobble
    outside = step(beyond, 0.0, per_image(style.uniform(low=0.6, high=3.0)))
    rim = step(beyond, -4.0, 0.0) * per_image(style.uniform(low=-0.3, high=0.2))
    grit = noise(pose, x / 2.5 + 9, y / 2.5) * per_image(style.uniform(high=0.3))
    ground = per_image(style.uniform()) + grit
    cut = torch.lerp(image_B3HW[index] + rim[:, None], ground[:, None], outside[:, None])
    image_B3HW, part_BHW = image_B3HW.clone(), part_BHW.clone()
    image_B3HW[index] = cut.clamp(0, 1)
    part_BHW[index] &= outside < 0.5
    return image_B3HW, part_BHW


def light(style: Draws, pose: Draws, image_B3HW: Tensor) -> Tensor:
    """Exposure, a gradient across the picture, a vignette, defocus, gamma and sensor noise."""
    size = image_B3HW.shape[-1]
    x, y = (axis * (2 / size) for axis in pixel_grid(len(style), size, image_B3HW.device))
    angle = per_image(pose.uniform(high=2 * math.pi))
    slope = per_image(pose.uniform(high=0.28)) * (x * angle.cos() + y * angle.sin())
    vignette = per_image(style.uniform(low=-0.25, high=0.08)) * (x**2 + y**2) * 0.5
    # Most stations hold the exposure; some picture one product at several.
    varies = per_image(style.chance(0.3).float())
    exposure = per_image(pose.uniform(low=0.86, high=1.14))
    exposure = exposure * per_image(pose.log_uniform(low=0.55, high=1.4)) ** varies
    sharp = _sharpen(style, _blur(style, image_B3HW))
    lit = (sharp * (exposure + slope + vignette)[:, None]).clamp(1e-4, 1)
    lit = lit ** per_image(style.log_uniform(low=0.65, high=1.5))[:, None]
    level = per_image(style.uniform(high=0.035).square() / 0.035)[:, None]
    sensor = pose.uniform(1, size, size) + pose.uniform(1, size, size) - 1
    # Compression and demosaicing leave noise in grains of some pixels.
    cell = per_image(style.uniform(low=1.0, high=3.0)) * (2 / size)
    grain = noise(pose, x / cell, y / cell)[:, None] - 0.5
    coarse = per_image(style.chance(0.3) * style.uniform(high=0.1))[:, None]
    return (lit + sensor * 2.4 * level + grain * coarse).clamp(0, 1)


def _blur(style: Draws, image_B3HW: Tensor) -> Tensor:
    """Up to about one pixel of defocus, in a seventh of the styles up to two."""
    near = (style.chance(0.6) * style.uniform(high=0.25))[:, None, None, None]
    far = (style.chance(0.15) * style.uniform(high=0.25))[:, None, None, None]
    for side, reach in ((near, 1), (near, 1), (far, 2)):
        image_B3HW = torch.lerp(image_B3HW, _beside(image_B3HW, -1, reach), 2 * side)
        image_B3HW = torch.lerp(image_B3HW, _beside(image_B3HW, -2, reach), 2 * side)
    return image_B3HW


def _sharpen(style: Draws, image_B3HW: Tensor) -> Tensor:
    """Overshooting edges, as cameras make them, in a quarter of the styles."""
    amount = (style.chance(0.25) * style.uniform(high=1.5))[:, None, None, None]
    around = (_beside(image_B3HW, -1, 1) + _beside(image_B3HW, -2, 1)) / 2
    return image_B3HW + amount * (image_B3HW - around)


def _beside(image_B3HW: Tensor, axis: int, reach: int) -> Tensor:
    """The mean of the two pixels `reach` before and behind each along an axis."""
    padding = (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach)
    wide, size = F.pad(image_B3HW, padding, mode="replicate"), image_B3HW.shape[axis]
    return (wide.narrow(axis, 0, size) + wide.narrow(axis, 2 * reach, size)) / 2


def orient(draws: Draws, fields_BCHW: Tensor) -> Tensor:
    """One of the 8 flips and quarter turns an image."""
    for axes in ((-1,), (-2,)):
        chosen = draws.chance(0.5)[:, None, None, None]
        fields_BCHW = torch.where(chosen, fields_BCHW.flip(axes), fields_BCHW)
    chosen = draws.chance(0.5)[:, None, None, None]
    return torch.where(chosen, fields_BCHW.transpose(-1, -2), fields_BCHW)


def recolour(draws: Draws, image_B3HW: Tensor) -> Tensor:
    """Permuted channels, and sometimes the negative."""
    order = draws.uniform(3).argsort(dim=1)[:, :, None, None].expand_as(image_B3HW)
    image = image_B3HW.gather(1, order)
    return torch.where(draws.chance(0.15)[:, None, None, None], 1 - image, image)
