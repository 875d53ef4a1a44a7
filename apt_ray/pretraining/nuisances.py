"""Harmless variation, labelled normal: dirt before the defects, light and sensor after them.

How much there is belongs to the style, so that the reference of a pair shows it too; where it lies
belongs to each picture. Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import fractal, noise, per_image, pixel_grid, step


def add_dirt(style: Draws, pose: Draws, image_B3HW: Tensor) -> Tensor:
    """Dust all over and wide faint smudges."""
    x, y = pixel_grid(len(style), image_B3HW.shape[-1], image_B3HW.device)
    dusty, smudged = per_image(style.chance(0.3)), per_image(style.chance(0.35))
    polarity = per_image(style.sign())
    dust = step(noise(pose, x / 2.5, y / 2.5), 0.88, 0.97)
    dust = dust * dusty * per_image(style.uniform(low=0.05, high=0.2))
    smudge = step(fractal(pose, x / 24, y / 24, octaves=3), 0.0, 0.5)
    smudge = smudge * smudged * per_image(style.uniform(low=0.04, high=0.14))
    return (image_B3HW + (polarity * (dust + smudge))[:, None]).clamp(0, 1)


def light(style: Draws, pose: Draws, image_B3HW: Tensor) -> Tensor:
    """Exposure, a gradient across the picture, a vignette and the sensor's noise."""
    size = image_B3HW.shape[-1]
    x, y = (axis * (2 / size) for axis in pixel_grid(len(style), size, image_B3HW.device))
    angle = per_image(pose.uniform(high=2 * math.pi))
    slope = per_image(pose.uniform(high=0.22)) * (x * angle.cos() + y * angle.sin())
    vignette = per_image(style.uniform(low=-0.25, high=0.08)) * (x**2 + y**2) * 0.5
    exposure = per_image(pose.uniform(low=0.92, high=1.08))
    lit = image_B3HW * (exposure + slope + vignette)[:, None]
    level = per_image(style.uniform(high=0.035).square() / 0.035)[:, None]
    sensor = pose.uniform(1, size, size) + pose.uniform(1, size, size) - 1
    return (lit + sensor * 2.4 * level).clamp(0, 1)


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
