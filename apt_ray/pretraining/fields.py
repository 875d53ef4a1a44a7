"""Scalar fields over the pixel grid, from which surfaces and defects are composed.

Coordinates are in pixels from the centre of the image. Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.pretraining.draws import Draws

_LATTICE = 32


def pixel_grid(image_count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of every pixel centre, (B, H, W) each, in pixels from the image's centre."""
    axis = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
    y_HW, x_HW = torch.meshgrid(axis, axis, indexing="ij")
    return x_HW.expand(image_count, -1, -1), y_HW.expand(image_count, -1, -1)


def per_image(value_B: Tensor) -> Tensor:
    """(B,) as (B, 1, 1), to be combined with fields."""
    return value_B[:, None, None]


def rotate(x_BHW: Tensor, y_BHW: Tensor, angle_B: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame turned by an angle in radians."""
    cos, sin = per_image(angle_B.cos()), per_image(angle_B.sin())
    return x_BHW * cos + y_BHW * sin, y_BHW * cos - x_BHW * sin


def step(value: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Smooth step from 0 at `low` to 1 at `high`; falling where high < low."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def line(distance: Tensor, half_width: float | Tensor) -> Tensor:
    """1 within `half_width` of zero distance, with an edge of one pixel."""
    return (half_width + 0.5 - distance.abs()).clamp(0, 1)


def fraction(value: Tensor) -> Tensor:
    """Position within the unit cell, from -0.5 to 0.5."""
    return value - value.round()


def lookup(table_BGG: Tensor, u_BHW: Tensor, v_BHW: Tensor) -> Tensor:
    """Entries of a periodic table (B, G, G) at the cells that contain (u, v)."""
    cells = table_BGG.shape[-1]
    column = torch.remainder(u_BHW.floor(), cells).long()
    row = torch.remainder(v_BHW.floor(), cells).long()
    flat = (row * cells + column).clamp_(0, cells * cells - 1).flatten(1)
    return table_BGG.flatten(1).gather(1, flat).view_as(u_BHW)


def noise(draws: Draws, u_BHW: Tensor, v_BHW: Tensor) -> Tensor:
    """Value noise in 0..1 with features one unit of (u, v) wide."""
    table = F.pad(draws.uniform(1, _LATTICE, _LATTICE), (0, 1, 0, 1), mode="circular")
    position = torch.stack((u_BHW, v_BHW), dim=-1)
    cell = position.floor()
    position = torch.remainder(cell, _LATTICE) + step(position - cell, 0.0, 1.0)
    grid = position * (2 / _LATTICE) - 1
    return F.grid_sample(table, grid, mode="bilinear", align_corners=True)[:, 0]


def fractal(
    draws: Draws, u_BHW: Tensor, v_BHW: Tensor, *, octaves: int = 3, gain: float | Tensor = 0.5
) -> Tensor:
    """Sum of `octaves` of noise, each finer by 2 and weaker by `gain`; about -1..1."""
    total = torch.zeros_like(u_BHW)
    weight: float | Tensor = 1.0
    norm: float | Tensor = 0.0
    for octave in range(octaves):
        scale = 2.0**octave
        shift = 17.3 * octave
        total = total + weight * (noise(draws, u_BHW * scale + shift, v_BHW * scale) - 0.5)
        norm = norm + weight
        weight = weight * gain
    return total * 2.5 / norm


def voronoi(draws: Draws, u_BHW: Tensor, v_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the nearest and second nearest seed of a jittered lattice, and the nearest
    cell's random tone in 0..1."""
    tables = draws.uniform(3, _LATTICE, _LATTICE)
    cell_u, cell_v = u_BHW.floor(), v_BHW.floor()
    nearest = torch.full_like(u_BHW, 9.0)
    second = torch.full_like(u_BHW, 9.0)
    tone = torch.zeros_like(u_BHW)
    flat = tables.flatten(2)
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            i, j = cell_u + column, cell_v + row
            index = torch.remainder(j, _LATTICE) * _LATTICE + torch.remainder(i, _LATTICE)
            index = index.long().flatten(1)[:, None].expand(-1, 3, -1)
            jitter_u, jitter_v, shade = (
                flat.gather(2, index).unflatten(2, u_BHW.shape[1:]).unbind(1)
            )
            distance = torch.hypot(i + jitter_u - u_BHW, j + jitter_v - v_BHW)
            closer = distance < nearest
            second = torch.where(closer, nearest, torch.minimum(second, distance))
            tone = torch.where(closer, shade, tone)
            nearest = torch.minimum(nearest, distance)
    return nearest, second, tone


def box(x_BHW: Tensor, y_BHW: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    """Signed distance to an axis-aligned box, negative inside."""
    dx, dy = x_BHW.abs() - half_width, y_BHW.abs() - half_height
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def polygon(x_BHW: Tensor, y_BHW: Tensor, sides: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the edges of a regular polygon of given inner radius, negative inside."""
    sector = 2 * math.pi / sides
    angle = fraction(torch.atan2(y_BHW, x_BHW) / sector) * sector
    return torch.hypot(x_BHW, y_BHW) * angle.cos() - radius


def blob(draws: Draws, x_BHW: Tensor, y_BHW: Tensor, roughness: float) -> Tensor:
    """Distance over the radius of an irregular outline of mean radius 1 around the origin."""
    phase, height = draws.uniform(4) * 2 * math.pi, draws.uniform(4) * roughness
    angle = torch.atan2(y_BHW, x_BHW)
    outline = torch.ones_like(x_BHW)
    for k in range(4):
        wave = (angle * (k + 2) + per_image(phase[:, k])).cos()
        outline = outline + wave * per_image(height[:, k]) / (k + 1.5)
    return torch.hypot(x_BHW, y_BHW) / outline.clamp(min=0.25)


def region(style: Draws, pose: Draws, size: int) -> Tensor:
    """1 inside a random box, band, spot or half of the picture, 0 outside; the pose moves it."""
    x, y = pixel_grid(len(style), size, style.key_B.device)
    angle = style.integers(4) * (math.pi / 2) + style.chance(0.3) * style.uniform(high=math.pi)
    x, y = rotate(x, y, angle + pose.uniform(low=-0.05, high=0.05))
    place = (style.uniform(2, low=-0.25, high=0.25) + pose.uniform(2, low=-0.05, high=0.05)) * size
    x, y = x - per_image(place[:, 0]), y - per_image(place[:, 1])
    extent = style.uniform(2, low=0.1, high=0.4) * size
    width, height = per_image(extent[:, 0]), per_image(extent[:, 1])
    shapes = torch.stack(
        (box(x, y, width, height), x.abs() - width, torch.hypot(x, y) - width, x), dim=1
    )
    kind = style.integers(4)[:, None, None, None].expand(-1, 1, size, size)
    distance = shapes.gather(1, kind)[:, 0]
    return step(distance, per_image(style.log_uniform(low=0.7, high=6)), 0.0)
