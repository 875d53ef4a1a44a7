"""Circuit boards and solar cells.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt_ray.pretraining.fields import (
    box,
    fractal,
    fraction,
    line,
    lookup,
    per_image,
    rotate,
    step,
    voronoi,
)
from apt_ray.pretraining.surfaces.scene import Rendering, Scene


def board(scene: Scene) -> Rendering:
    """Conductor tracks, soldered pads and dark packages."""
    angle = scene.style.integers(4) * (math.pi / 2) + scene.pose.uniform(low=-0.02, high=0.02)
    u, v = rotate(scene.x, scene.y, angle)
    shift = scene.pose.uniform(2, low=-4, high=4) + scene.layout.uniform(2, high=100)
    u, v = u + per_image(shift[:, 0]), v + per_image(shift[:, 1])
    pitch = scene.scale(5, 11)
    s, t = u / pitch, v / pitch
    width = scene.amount(0.6, 1.6)
    along = lookup((scene.layout.uniform(16, 16) < 0.5).float(), s / 4, t + 0.5)
    across = lookup((scene.layout.uniform(16, 16) < 0.35).float(), s + 0.5, t / 5)
    tracks = torch.maximum(
        along * line(fraction(t) * pitch, width), across * line(fraction(s) * pitch, width)
    )
    image = scene.blend(tracks * scene.amount(0.25, 0.8))
    has_pad = lookup((scene.layout.uniform(16, 16) < 0.22).float(), s + 0.5, t + 0.5)
    radius = torch.hypot(fraction(s), fraction(t)) * pitch
    pad = has_pad * line(radius, pitch * scene.amount(0.25, 0.42))
    metal = per_image(scene.style.uniform(low=0.6, high=0.95))[:, None]
    image = torch.lerp(image, metal.expand_as(image), pad[:, None])
    drill = has_pad * line(radius, pitch * 0.13) * scene.option(0.6)
    image = image * (1 - 0.85 * drill[:, None])
    block = fraction(s / 9) * 9 * pitch, fraction(t / 7) * 7 * pitch
    package = lookup((scene.layout.uniform(16, 16) < 0.35).float(), s / 9 + 0.5, t / 7 + 0.5)
    body = box(*block, pitch * scene.amount(1.2, 3.2), pitch * scene.amount(0.8, 2.2))
    image = torch.lerp(
        image, 0.25 * scene.colour(2), (package * line(body.clamp(min=0), 0))[:, None]
    )
    return scene.fill(image + scene.grain(u, v, 3, scene.amount(0.0, 0.06)))


def traces(scene: Scene) -> Rendering:
    """A dense two-tone conductor pattern: straight and slanted routes, pads and filled areas."""
    angle = scene.style.integers(4) * (math.pi / 2) + scene.pose.uniform(low=-0.02, high=0.02)
    u, v = rotate(scene.x, scene.y, angle)
    shift = scene.layout.uniform(2, low=-99, high=99) + scene.pose.uniform(2, low=-2, high=2)
    u, v = u + per_image(shift[:, 0]), v + per_image(shift[:, 1])
    pitch = scene.scale(5, 16)
    width = pitch * scene.amount(0.12, 0.32)
    bent = v + pitch * _bends(scene, u / pitch)
    tone = _routes(scene, u / pitch, bent / pitch, pitch, width)
    slanted = _routes(scene, (u + v) * 0.7071 / pitch, (u - v) * 0.7071 / pitch, pitch, width)
    is_slanted = fractal(scene.layout, u / (6 * pitch), v / (6 * pitch), octaves=1)
    tone = torch.where(is_slanted > scene.amount(0.1, 0.9), slanted, tone)
    s, t = u / pitch, v / pitch
    has_pad = lookup((scene.layout.uniform(16, 16) < 0.18).float(), s + 0.5, t + 0.5)
    is_square = lookup((scene.layout.uniform(16, 16) < 0.4).float(), s + 0.5, t + 0.5) > 0
    ds, dt = fraction(s).abs(), fraction(t).abs()
    radius = torch.where(is_square, torch.maximum(ds, dt), torch.hypot(ds, dt)) * pitch
    extent = lookup(scene.layout.uniform(16, 16, low=0.25, high=0.5), s + 0.5, t + 0.5)
    pad = has_pad * line(radius, pitch * extent)
    drill = has_pad * line(radius, pitch * 0.14) * scene.option(0.3)
    area = fractal(scene.layout, u / (4 * pitch), v / (4 * pitch), octaves=1)
    filled = step(area, 0.58 - scene.amount(0.0, 0.5), 0.6) * scene.option(0.5)
    tone = torch.maximum(torch.maximum(tone, pad), filled) - drill
    dark, bright = scene.amount(0.02, 0.3)[:, None], scene.amount(0.65, 0.98)[:, None]
    near_binary = torch.lerp(dark, bright, tone[:, None]).expand(-1, 3, -1, -1)
    image = torch.where(scene.option(0.6)[:, None] > 0, near_binary, scene.blend(tone))
    return scene.fill(image + scene.grain(u, v, 2, scene.amount(0.0, 0.05)))


def _routes(scene: Scene, s: Tensor, t: Tensor, pitch: Tensor, width: Tensor) -> Tensor:
    """Lines along both axes of a lattice, present by the layout's tables."""
    along = lookup((scene.layout.uniform(16, 16) < 0.7).float(), s / 4, t + 0.5)
    across = lookup((scene.layout.uniform(16, 16) < 0.25).float(), s + 0.5, t / 3)
    return torch.maximum(
        along * line(fraction(t) * pitch, width), across * line(fraction(s) * pitch, width)
    )


def _bends(scene: Scene, s: Tensor) -> Tensor:
    """Offset, in cells, of routes that swerve by 45 degrees here and there."""
    slope = scene.layout.integers(3, 1, 16).float() - 1
    slope = slope * scene.layout.chance(0.35, 1, 16) * scene.layout.chance(0.6, 1, 1)
    closed = slope - slope.mean(-1, keepdim=True)
    start = (closed.cumsum(-1) - closed).expand(-1, 16, -1)
    within = s / 2 - (s / 2).floor()
    rows = torch.zeros_like(s)
    return 2 * (
        lookup(start, s / 2, rows) + within * lookup(closed.expand(-1, 16, -1), s / 2, rows)
    )


def wafer(scene: Scene) -> Rendering:
    """A dark plate with faint crystals, thin fingers and a few bright bars."""
    x, y = scene.part_frame()
    angle = scene.pose.uniform(high=6.28)
    u, v = rotate(scene.x, scene.y, angle)
    cell = scene.scale(6, 18)
    _, _, tone = voronoi(scene.pose, u / cell + 9, v / cell)
    crystals = scene.blend(tone * scene.option(0.6) * scene.amount(0.1, 0.5))
    bars = scene.style.integers(4)[:, None, None] + 2
    bar = line(
        fraction(x * bars / 2 + 0.5 * (bars % 2 - 1)) * scene.size / bars, scene.amount(0.5, 1.6)
    )
    finger = line(fraction(y * scene.size / 2 / 4) * 4, 0.3) * scene.option(0.5)
    image = crystals + (scene.amount(0.15, 0.5) * bar + 0.12 * finger)[:, None]
    edge = box(x, y, scene.amount(0.8, 1.5), scene.amount(0.8, 1.5))
    return scene.place(image, edge)


def cell(scene: Scene) -> Rendering:
    """A luminescent monocrystalline cell: bright inside, dark corners, busbars and fingers."""
    x, y = scene.x * (2 / scene.size), scene.y * (2 / scene.size)
    turn = scene.style.chance(0.5)[:, None, None]
    x, y = torch.where(turn, y, x), torch.where(turn, x, y)
    zoom = scene.amount(0.95, 1.15)
    x, y = x * zoom + per_image(scene.pose.uniform(low=-0.03, high=0.03)), y * zoom
    level, fall = scene.amount(0.35, 0.8), scene.amount(0.05, 0.45)
    blotch = fractal(scene.pose, scene.x / 20, scene.y / 20, octaves=3) * scene.amount(0.0, 0.12)
    tilt = (x * per_image(scene.pose.uniform(low=-1, high=1))) * 0.08
    tone = level * (1 - fall * (x**2 + y**2) * 0.7) + blotch + tilt
    bars = (scene.style.integers(4) + 2).float()[:, None, None]
    bar = line(fraction(y * bars / 2 + 0.5) * scene.size / bars, scene.amount(0.3, 1.8))
    contrast = scene.amount(-0.45, 0.2)
    finger = line(fraction(x * scene.size / 2 / scene.amount(2.2, 5)) * 4, 0.2)
    tone = tone + contrast * bar - finger * scene.amount(0.0, 0.08)
    edge = torch.maximum(x.abs(), y.abs()) - scene.amount(0.95, 1.3)
    corner = x.abs() + y.abs() - scene.amount(1.6, 2.2)
    dark = step(torch.maximum(edge, corner), 0.0, scene.amount(0.01, 0.12)) * scene.amount(0.5, 1)
    image = (tone * (1 - dark))[:, None].expand(-1, 3, -1, -1)
    return scene.fill(image + scene.grain(x * 40, y * 40, 1.2, scene.amount(0.0, 0.06)))
