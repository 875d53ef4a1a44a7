"""Surfaces that fill the picture.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch

from apt_ray.pretraining.fields import (
    fractal,
    fraction,
    line,
    lookup,
    noise,
    per_image,
    step,
    voronoi,
)
from apt_ray.pretraining.surfaces.scene import Rendering, Scene


def rough(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    cell = scene.scale(2.5, 14)
    tone = fractal(scene.pose, u / cell, v / cell, octaves=4, gain=scene.amount(0.4, 0.9))
    return scene.fill(scene.blend(0.5 + scene.amount(0.15, 0.6) * tone))


def brushed(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    width = scene.scale(0.9, 3)
    tone = noise(scene.pose, u / scene.scale(20, 120), v / width)
    tone = 0.6 * tone + 0.4 * noise(scene.pose, u / 60, v / (width * 3))
    return scene.fill(scene.blend(0.5 + scene.amount(0.2, 0.8) * (tone - 0.5)))


def smooth(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    tone = 0.5 + scene.amount(0.0, 0.35) * fractal(scene.pose, u / 50, v / 50, octaves=2)
    image = scene.blend(tone) + scene.grain(u, v, 2.0, scene.amount(0.0, 0.05))
    return scene.fill(image)


def weave(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    pitch = scene.scale(3.5, 9)
    wobble = fractal(scene.pose, u / 25, v / 25, octaves=2) * scene.amount(0.05, 0.35)
    s, t = u / pitch + wobble, v / pitch * scene.amount(0.7, 1.0) + wobble
    twill = scene.option(0.4)
    over = torch.remainder(s.round() + t.round() + twill * t.round(), 2 + twill) < 1
    across, along = fraction(s), fraction(t)
    thread = torch.where(over, 1 - 3.2 * across**2, 1 - 3.2 * along**2)
    image = scene.blend(torch.where(over, 0.0, scene.amount(0.1, 1.0)))
    return scene.fill(
        image * (0.35 + 0.65 * thread[:, None]) + scene.grain(u, v, 1.5, scene.amount(0.0, 0.12))
    )


def mesh(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    pitch = scene.scale(7, 18)
    bend = fractal(scene.pose, u / 30, v / 30, octaves=1) * scene.amount(0.0, 1.0)
    wire = scene.amount(0.8, 2.2)
    slant = scene.option(0.3)
    first = fraction((u + bend + slant * v) / pitch) * pitch
    second = fraction((v + bend - slant * u) / pitch) * pitch
    tone = torch.maximum(line(first, wire), line(second, wire))
    shade = 1 - 0.3 * (torch.minimum(first.abs(), second.abs()) / wire).clamp(0, 1)
    return scene.fill(scene.blend(tone) * shade[:, None])


def tiles(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    height = scene.scale(11, 30)
    row = v / height
    bond = scene.option(0.5) * 0.5 * torch.remainder(row.floor(), 2)
    width = height * scene.amount(1.0, 2.2)
    column = u / width + bond
    gap = torch.minimum(fraction(column).abs() * width, fraction(row).abs() * height)
    joint = scene.amount(0.5, 1.6)
    tone = lookup(scene.pose.uniform(16, 16), column, row) * scene.amount(0.0, 0.5)
    tile = scene.blend(tone) + scene.grain(u, v, 4, scene.amount(0.0, 0.12))
    return scene.fill(torch.lerp(tile, scene.colour(2), line(gap, joint)[:, None]))


def grains(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    cell = scene.scale(4, 16)
    nearest, second, tone = voronoi(scene.pose, u / cell, v / cell)
    edge = step(second - nearest, 0.0, scene.amount(0.08, 0.25))
    dome = 1 - scene.amount(0.0, 0.5) * nearest
    image = scene.blend(tone * scene.amount(0.1, 0.9)) * dome[:, None]
    return scene.fill(image * (1 - scene.amount(0.0, 0.6) * (1 - edge))[:, None])


def wood(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    warp = fractal(scene.pose, u / 70, v / 22, octaves=2) * scene.amount(3, 12)
    rings = torch.sin((v + warp) * (2 * math.pi / scene.scale(5, 18)))
    fibre = noise(scene.pose, u / 18, v / 1.2) - 0.5
    tone = 0.5 + scene.amount(0.15, 0.4) * rings + scene.amount(0.1, 0.4) * fibre
    return scene.fill(scene.blend(tone))


def leather(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    cell = scene.scale(2.5, 6)
    bend = fractal(scene.pose, u / 9, v / 9, octaves=2) * 0.6
    nearest, second, tone = voronoi(scene.pose, u / cell + bend, v / cell - bend)
    crease = 1 - step(second - nearest, 0.0, 0.35)
    shade = 1 - scene.amount(0.15, 0.5) * crease + 0.12 * (tone - 0.5)
    return scene.fill(scene.blend(0.3 * bend + 0.2) * shade[:, None])


def ribs(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    pitch = scene.scale(4, 16)
    bend = scene.amount(0.0, 3.0) * torch.sin(u / scene.scale(20, 60))
    wave = torch.sin((v + bend) * (2 * math.pi / pitch))
    tone = 0.5 + 0.5 * wave * scene.amount(0.4, 1.0)
    sharp = torch.where(scene.option(0.4) > 0, step(wave, -0.25, 0.25), tone)
    image = scene.blend(sharp) + scene.grain(u, v, 3, scene.amount(0.0, 0.1))
    return scene.fill(image)


def dots(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    pitch = scene.scale(6, 16)
    row = v / pitch
    column = u / pitch + scene.option(0.5) * 0.5 * torch.remainder(row.round(), 2)
    distance = torch.hypot(fraction(column), fraction(row)) * pitch
    tone = line(distance, pitch * scene.amount(0.18, 0.36))
    image = scene.blend(tone) + scene.grain(u, v, 3, scene.amount(0.0, 0.08))
    return scene.fill(image)


def label(scene: Scene) -> Rendering:
    """Rows of glyph-like marks on a plain sheet."""
    u, v = scene.texture_frame()
    pixel = scene.scale(1.2, 2.6)
    row, column = v / pixel, u / pixel
    in_text = (torch.remainder(row, 8) < 5).float() * (torch.remainder(column, 5) < 4).float()
    strokes = lookup((scene.layout.uniform(32, 32) < 0.55).float(), column, row)
    words = lookup((scene.layout.uniform(32, 32) < 0.8).float(), column / 15, row / 8)
    ink = in_text * strokes * words
    image = scene.blend(ink * scene.amount(0.5, 1.0)) + scene.grain(
        u, v, 4, scene.amount(0.0, 0.06)
    )
    return scene.fill(image)


def casting(scene: Scene) -> Rendering:
    """A matt gray casting: fine grain, ground streaks, shading, and margins of other brightness."""
    u, v = scene.texture_frame()
    grain = fractal(scene.pose, u / 2.2, v / 2.2, octaves=3, gain=0.8) * scene.amount(0.02, 0.14)
    streak = noise(scene.pose, u / scene.scale(20, 90), v / scene.scale(0.8, 3)) - 0.5
    cloud = fractal(scene.pose, u / 30, v / 30, octaves=2) * scene.amount(0.0, 0.12)
    tone = scene.amount(0.2, 0.75) + grain + cloud + streak * scene.amount(0.0, 0.2)
    # A zone that was ground less, or not at all.
    zone = step(fractal(scene.pose, u / 26, v / 26, octaves=2), 0.15, 0.25) * scene.option(0.3)
    tone = tone + zone * (scene.amount(-0.12, 0.12) + grain * scene.amount(-0.8, 0.8))
    for distance in (scene.x, -scene.x, scene.y, -scene.y):
        inner = scene.size * (0.5 - per_image(scene.style.uniform(low=0.02, high=0.22)))
        inner = inner + scene.size * per_image(scene.pose.uniform(low=-0.04, high=0.04))
        margin = step(distance - inner, 0.0, scene.amount(0.7, 5))
        tone = tone + margin * scene.amount(-0.45, 0.25) * scene.option(0.35)
        rim = line(distance - inner, 0.5) * scene.amount(-0.2, 0.3) * scene.option(0.2)
        tone = tone + rim
    return scene.fill(tone[:, None].expand(-1, 3, -1, -1))


def marble(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    warp = fractal(scene.pose, u / 30, v / 30, octaves=3) * 2.0
    vein = fractal(scene.pose, u / 40 + warp, v / 28 - warp, octaves=2).abs()
    cloud = 0.3 * fractal(scene.pose, u / 45, v / 45, octaves=2)
    tone = (1 - step(vein, 0.0, scene.amount(0.06, 0.25))) * scene.amount(0.3, 0.9)
    return scene.fill(scene.blend((tone + cloud).clamp(0, 1)))


def slab(scene: Scene) -> Rendering:
    """A hot rolled slab: long scale streaks, clouds of oxide, dark sides, dirt."""
    u, v = scene.texture_frame()
    scale = fractal(scene.pose, u / scene.scale(12, 40), v / scene.scale(3, 8), octaves=4, gain=0.7)
    oxide = step(fractal(scene.pose, u / 18, v / 11, octaves=3), 0.1, 0.6)
    tone = scene.amount(0.25, 0.6) + 0.12 * scale - scene.amount(0.02, 0.14) * oxide
    side = scene.x.abs() * (2 / scene.size) + 0.06 * fractal(scene.pose, u / 12, v / 12)
    tone = tone - scene.amount(0.0, 0.4) * step(side, scene.amount(0.6, 0.95), 1.05)
    image = scene.blend(tone.clamp(0, 1)) + scene.grain(u, v, 1.5, scene.amount(0.0, 0.15))
    return scene.fill(image)


def panel(scene: Scene) -> Rendering:
    """A two-tone front panel: nested frames, slots and rows of holes on a lattice."""
    u, v = scene.texture_frame()
    pitch = scene.scale(14, 34)
    s, t = u / pitch, v / (pitch * scene.amount(0.6, 1.0))
    kind = lookup(scene.layout.uniform(16, 16), s + 0.5, t + 0.5)
    ds, dt = fraction(s).abs(), fraction(t).abs()
    square, round_ = torch.maximum(ds, dt), torch.hypot(ds, dt)
    slot = torch.maximum(ds / 3, dt)
    distance = torch.where(kind < 0.4, square, torch.where(kind < 0.7, round_, slot)) * pitch
    ring = line(distance - pitch * scene.amount(0.24, 0.4), pitch * 0.05)
    core = line(distance, pitch * scene.amount(0.06, 0.16))
    image = scene.blend(torch.maximum(ring, core) * (kind < scene.amount(0.5, 1.0)))
    return scene.fill(image + scene.grain(u, v, 3, scene.amount(0.0, 0.08)))


def honeycomb(scene: Scene) -> Rendering:
    u, v = scene.texture_frame()
    pitch = scene.scale(8, 20)
    s, t = u / pitch, v / pitch / math.sqrt(3)
    ds, dt = fraction(s), fraction(t) * math.sqrt(3)
    other_ds, other_dt = fraction(s + 0.5), fraction(t + 0.5) * math.sqrt(3)
    nearer = torch.hypot(ds, dt) < torch.hypot(other_ds, other_dt)
    ds, dt = torch.where(nearer, ds, other_ds).abs(), torch.where(nearer, dt, other_dt).abs()
    from_centre = torch.maximum(ds, 0.5 * ds + math.sqrt(0.75) * dt)
    wall = line((0.5 - from_centre) * pitch, scene.amount(0.4, 1.4))
    depth = 1 - scene.amount(0.1, 0.8) * from_centre
    grain = scene.grain(u, v, 3, scene.amount(0.0, 0.08))
    return scene.fill(scene.blend(wall) * depth[:, None] + grain)
