"""Single parts on a plain ground.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math

import torch

from apt_ray.pretraining.fields import box, fraction, line, per_image, polygon, step
from apt_ray.pretraining.surfaces.scene import Rendering, Scene


def flange(scene: Scene) -> Rendering:
    """A turned disk with a bore, a circle of holes and concentric tool marks."""
    x, y = scene.part_frame()
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    outer = scene.amount(0.7, 0.95)
    bore = outer * scene.amount(0.15, 0.55)
    marks = torch.sin(radius * scene.size / scene.amount(1.2, 4)) * scene.amount(0.0, 0.15)
    sheen = torch.cos(2 * angle + per_image(scene.pose.uniform(high=6.28))) * scene.amount(0, 0.3)
    image = scene.blend((0.4 + marks + sheen).clamp(0, 1))
    lip = line((radius - outer * 0.9) * scene.size / 2, 1.0) * scene.option(0.6)
    image = image * (1 - 0.4 * lip[:, None])
    holes = scene.style.integers(6)[:, None, None] + 3
    pitch_radius = (outer + bore) / 2
    turn = fraction(angle * holes / (2 * math.pi)) * 2 * math.pi / holes
    hole = torch.hypot(radius * turn.cos() - pitch_radius, radius * turn.sin())
    hole = hole - (outer - bore) * scene.amount(0.12, 0.28) + 9 * (1 - scene.option(0.6))
    return scene.place(image, torch.maximum(radius - outer, torch.maximum(bore - radius, -hole)))


def capsule(scene: Scene) -> Rendering:
    """A smooth moulded body, one- or two-coloured, lit from one side."""
    x, y = scene.part_frame()
    half_width, half_height = scene.amount(0.45, 0.9), scene.amount(0.3, 0.85)
    power = scene.amount(2.0, 5.0)
    body = ((x / half_width).abs() ** power + (y / half_height).abs() ** power) ** (1 / power)
    light = per_image(scene.pose.uniform(high=6.28))
    dome = (1 - (body**2).clamp(max=1) * scene.amount(0.2, 0.7)).clamp(min=0)
    shade = dome * (1 + 0.2 * (x * light.cos() + y * light.sin()))
    halves = scene.option(0.5) * step(x, -0.02, 0.02)
    image = scene.blend(halves) * shade[:, None]
    seam = line(x * scene.size / 2, 0.6) * scene.option(0.3)
    image = image * (1 - 0.4 * seam[:, None])
    return scene.place(image, (body - 1) * torch.minimum(half_width, half_height))


def rod(scene: Scene) -> Rendering:
    """A long part: a shank, a head, and a thread on part of its length."""
    x, y = scene.part_frame()
    shank, length = scene.amount(0.12, 0.3), scene.amount(0.6, 0.95)
    thread_pitch = scene.scale(0.06, 0.16)
    thread = torch.sin((x + 0.3 * y) * (2 * math.pi / thread_pitch)) * (x > scene.amount(-0.4, 0.4))
    profile = shank + 0.02 * thread
    head = box(x + length, y, scene.amount(0.08, 0.22), shank * scene.amount(1.0, 2.2))
    body = torch.minimum(box(x, y, length, profile), head)
    round_shade = 1 - 0.75 * (y / shank).clamp(-1.4, 1.4) ** 2 * scene.amount(0.4, 0.9)
    image = scene.blend(0.5 + 0.35 * thread) * round_shade[:, None].clamp(min=0.1)
    return scene.place(image, body)


def nut(scene: Scene) -> Rendering:
    """A polygonal plate with a chamfered edge around a bore."""
    x, y = scene.part_frame()
    sides = (scene.style.integers(5) + 4).float()[:, None, None]
    outer = scene.amount(0.55, 0.8)
    edge = polygon(x, y, sides, outer)
    radius = torch.hypot(x, y)
    bore = outer * scene.amount(0.3, 0.6)
    facet = torch.cos(torch.atan2(y, x) + per_image(scene.pose.uniform(high=6.28)))
    chamfer = step(edge, -0.16, -0.1) * scene.option(0.7)
    tone = 0.4 + 0.25 * chamfer * facet + 0.2 * scene.option(0.5) * line(radius - bore * 1.25, 0.04)
    image = scene.blend(tone.clamp(0, 1)) + scene.grain(x * 40, y * 40, 2, scene.amount(0, 0.1))
    return scene.place(image, torch.maximum(edge, bore - radius))
