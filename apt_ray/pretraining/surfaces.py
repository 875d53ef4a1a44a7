"""Kinds of surface and part, each rendered for a whole batch at once.

A renderer draws the *style* (what two pictures of one product share) and the *pose* (what differs
between them) from separate streams, and returns a picture in 0..1 with the region that belongs to
the part; a surface fills the picture.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import (
    box,
    fractal,
    fraction,
    line,
    lookup,
    noise,
    per_image,
    pixel_grid,
    polygon,
    rotate,
    step,
    voronoi,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """`image_B3HW` in 0..1 and `part_BHW` (bool), where the inspected thing is."""

    image_B3HW: Tensor
    part_BHW: Tensor


class Scene:
    """What a renderer works with: the streams, the grid, and a palette of three colours."""

    def __init__(self, style: Draws, pose: Draws, size: int) -> None:
        self.style = style
        self.pose = pose
        self.size = size
        # Pictures of any aspect are squashed to a square, so circles need not be round.
        squash = per_image(style.log_uniform(low=0.8, high=1.25))
        x, y = pixel_grid(len(style), size, style.key_B.device)
        self.x, self.y = x * squash, y / squash
        self.palette_B33 = _palette(style)
        # In use the good pictures often show another layout, or another place, than the query.
        is_fixed = style.chance(0.6)
        self.layout = Draws(torch.where(is_fixed, style.fork(1).key_B, pose.fork(1).key_B))

    def texture_frame(self) -> tuple[Tensor, Tensor]:
        """Coordinates in pixels of an endless texture: turned by the style, shifted by the pose."""
        angle = self.style.integers(4) * (math.pi / 2) + self.style.chance(0.4) * (
            self.style.uniform(high=math.pi)
        )
        u, v = rotate(self.x, self.y, angle + self.pose.uniform(low=-0.06, high=0.06))
        shift = self.pose.uniform(2, low=-200, high=200)
        return u + per_image(shift[:, 0]), v + per_image(shift[:, 1])

    def part_frame(self) -> tuple[Tensor, Tensor]:
        """Coordinates of a part near the centre; 1 is half the side of the image."""
        free = self.style.chance(0.5)
        angle = self.style.integers(4) * (math.pi / 2) + torch.where(
            free,
            self.pose.uniform(high=2 * math.pi),
            self.pose.uniform(low=-0.05, high=0.05),
        )
        shift = self.pose.uniform(2, low=-0.08, high=0.08)
        zoom = per_image(self.style.uniform(low=1.0, high=1.35)) * (2 / self.size)
        x = self.x * zoom - per_image(shift[:, 0])
        y = self.y * zoom - per_image(shift[:, 1])
        return rotate(x, y, angle)

    def scale(self, low: float, high: float) -> Tensor:
        """(B, 1, 1) of the style, uniform in the logarithm."""
        return per_image(self.style.log_uniform(low=low, high=high))

    def amount(self, low: float, high: float) -> Tensor:
        """(B, 1, 1) of the style, uniform."""
        return per_image(self.style.uniform(low=low, high=high))

    def option(self, probability: float) -> Tensor:
        """(B, 1, 1) of the style, 0.0 or 1.0."""
        return per_image(self.style.chance(probability).float())

    def colour(self, index: int) -> Tensor:
        """(B, 3, 1, 1) colour of the palette."""
        return self.palette_B33[:, index, :, None, None]

    def blend(self, tone_BHW: Tensor, first: int = 0, second: int = 1) -> Tensor:
        """Mix two colours of the palette: `first` where the tone is 0, `second` where it is 1."""
        return torch.lerp(self.colour(first), self.colour(second), tone_BHW[:, None])

    def grain(self, u: Tensor, v: Tensor, cell: float | Tensor, strength: Tensor) -> Tensor:
        """Fine shading (B, 1, H, W) around 0 of the material itself."""
        return (strength * fractal(self.pose, u / cell, v / cell, octaves=2))[:, None]

    def fill(self, image_B3HW: Tensor) -> Rendering:
        """A surface that fills the picture."""
        image = image_B3HW.clamp(0, 1)
        return Rendering(image_B3HW=image, part_BHW=torch.ones_like(image[:, 0], dtype=torch.bool))

    def place(self, image_B3HW: Tensor, distance_BHW: Tensor) -> Rendering:
        """A part, where the distance (in half sides) is negative, on a plain ground."""
        u, v = self.x / 9 + 40 * self.pose.uniform(1, 1), self.y / 9
        tone = fractal(self.pose, u, v, octaves=2) * self.amount(0.0, 0.06)
        ground = (self.colour(2) + tone[:, None]).clamp(0, 1)
        inside = (0.5 - distance_BHW * (self.size / 2)).clamp(0, 1)
        shadow = self.option(0.4) * 0.35 * step(distance_BHW, 0.16, 0.0)
        image = torch.lerp(ground * (1 - shadow[:, None]), image_B3HW.clamp(0, 1), inside[:, None])
        return Rendering(image_B3HW=image, part_BHW=inside > 0.5)


Renderer = Callable[[Scene], Rendering]


def _palette(style: Draws) -> Tensor:
    """(B, 3, 3): two related colours for the thing and one for the ground; often gray."""
    base = style.uniform(1, 1, low=0.25, high=0.75)
    tint = style.normal(1, 3) * style.uniform(1, 1, high=0.22)
    partner_shade = base + style.sign(1, 1) * style.uniform(1, 1, low=0.12, high=0.45)
    partner = partner_shade + tint + style.normal(1, 3) * style.uniform(1, 1, high=0.15)
    ground_low = style.uniform(1, 1, low=0.0, high=0.2)
    ground = torch.where(base > 0.5, ground_low, 1 - ground_low) + style.normal(1, 3) * 0.05
    colours = torch.cat((base + tint, partner, ground), dim=1).clamp(0.03, 0.97)
    gray = style.chance(0.6)[:, None, None]
    return torch.where(gray, colours.mean(dim=-1, keepdim=True), colours)


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


def traces(scene: Scene) -> Rendering:
    """A dense two-tone conductor pattern: straight and slanted routes, pads and filled areas."""
    angle = scene.style.integers(4) * (math.pi / 2) + scene.pose.uniform(low=-0.02, high=0.02)
    u, v = rotate(scene.x, scene.y, angle)
    shift = scene.layout.uniform(2, low=-99, high=99) + scene.pose.uniform(2, low=-2, high=2)
    u, v = u + per_image(shift[:, 0]), v + per_image(shift[:, 1])
    pitch = scene.scale(5, 16)
    width = pitch * scene.amount(0.12, 0.32)
    tone = _routes(scene, u / pitch, v / pitch, pitch, width)
    slanted = _routes(scene, (u + v) * 0.7071 / pitch, (u - v) * 0.7071 / pitch, pitch, width)
    is_slanted = fractal(scene.layout, u / (6 * pitch), v / (6 * pitch), octaves=1)
    tone = torch.where(is_slanted > scene.amount(0.1, 0.9), slanted, tone)
    s, t = u / pitch, v / pitch
    has_pad = lookup((scene.layout.uniform(16, 16) < 0.18).float(), s + 0.5, t + 0.5)
    is_square = lookup((scene.layout.uniform(16, 16) < 0.4).float(), s + 0.5, t + 0.5) > 0
    ds, dt = fraction(s).abs(), fraction(t).abs()
    radius = torch.where(is_square, torch.maximum(ds, dt), torch.hypot(ds, dt)) * pitch
    pad = has_pad * line(radius, pitch * scene.amount(0.3, 0.48))
    drill = has_pad * line(radius, pitch * 0.14) * scene.option(0.3)
    area = fractal(scene.layout, u / (4 * pitch), v / (4 * pitch), octaves=1)
    filled = step(area, 0.55, 0.58) * scene.option(0.4)
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


def casting(scene: Scene) -> Rendering:
    """A matt gray casting: fine grain, ground streaks, shading, and margins of other brightness."""
    u, v = scene.texture_frame()
    grain = fractal(scene.pose, u / 2.2, v / 2.2, octaves=3, gain=0.8) * scene.amount(0.02, 0.14)
    streak = noise(scene.pose, u / scene.scale(20, 90), v / scene.scale(0.8, 3)) - 0.5
    cloud = fractal(scene.pose, u / 30, v / 30, octaves=2) * scene.amount(0.0, 0.12)
    tone = scene.amount(0.2, 0.75) + grain + cloud + streak * scene.amount(0.0, 0.2)
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


TRAINING_SURFACES: dict[str, Renderer] = {
    "rough": rough,
    "brushed": brushed,
    "smooth": smooth,
    "weave": weave,
    "mesh": mesh,
    "tiles": tiles,
    "grains": grains,
    "wood": wood,
    "leather": leather,
    "ribs": ribs,
    "dots": dots,
    "label": label,
    "board": board,
    "wafer": wafer,
    "flange": flange,
    "capsule": capsule,
    "rod": rod,
    "traces": traces,
    "cell": cell,
    "casting": casting,
}
BOARD_LIKE = ("board", "traces")
SOLAR_LIKE = ("wafer", "cell")
HELD_OUT_SURFACES: dict[str, Renderer] = {"marble": marble, "honeycomb": honeycomb, "nut": nut}
SURFACES = TRAINING_SURFACES | HELD_OUT_SURFACES
