"""Kinds of defect, each rendered for a whole batch at once, with exact masks.

A renderer returns where it acts (`alpha_BHW` in 0..1) and what it shows there (`paint_B3HW`); the
picture is their blend, so pixels with alpha 0 are untouched.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import (
    blob,
    fractal,
    fraction,
    line,
    noise,
    per_image,
    pixel_grid,
    rotate,
    step,
)

_MIN_ALPHA = 0.08
_CANDIDATES = 16


class Site:
    """One place on every picture of a batch: a local frame and the radius of the defect."""

    def __init__(self, draws: Draws, image_B3HW: Tensor, part_BHW: Tensor) -> None:
        self.draws = draws
        self.image_B3HW = image_B3HW
        size = image_B3HW.shape[-1]
        self.radius = per_image(draws.log_uniform(low=1.6, high=0.22 * size))
        centre = _centre_on_part(draws, part_BHW)
        x, y = pixel_grid(len(draws), size, image_B3HW.device)
        angle = draws.uniform(high=2 * math.pi)
        self.x, self.y = rotate(x - per_image(centre[:, 0]), y - per_image(centre[:, 1]), angle)
        saturation = image_B3HW.amax(1) - image_B3HW.amin(1)
        self.is_coloured = (saturation.amax((1, 2)) > 0.02).float()[:, None, None, None]
        self.direction = torch.stack((angle.cos(), angle.sin()), dim=-1)

    def unit(self, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
        """Local coordinates over the radius, the first one stretched."""
        return self.x / (self.radius * stretch), self.y / self.radius

    def amount(self, low: float, high: float) -> Tensor:
        """(B, 1, 1), uniform."""
        return per_image(self.draws.uniform(low=low, high=high))

    def contrast(self, low: float = 0.15, high: float = 0.6) -> Tensor:
        """(B, 1, 1, 1): how much darker (negative) or brighter a mark is."""
        return (per_image(self.draws.sign()) * self.amount(low, high))[:, None]

    def hue(self, spread: float) -> Tensor:
        """(B, 3, 1, 1) offset of the colour, none on gray pictures."""
        return self.draws.normal(3)[:, :, None, None] * spread * self.is_coloured

    def region(self, *, roughness: float, softness: float | Tensor, stretch: float = 1.0) -> Tensor:
        """1 in an irregular spot, falling to 0 at its outline over `softness` of the radius."""
        return step(blob(self.draws, *self.unit(stretch), roughness), 1.0, 1.0 - softness)

    def mean_colour(self) -> Tensor:
        """The surroundings without their texture, (B, 3, H, W)."""
        return F.avg_pool2d(self.image_B3HW, 15, stride=1, padding=7, count_include_pad=False)

    def shifted(self, dx: Tensor, dy: Tensor) -> Tensor:
        """The picture read at an offset in pixels (B, H, W) along the axes of the image."""
        size = self.image_B3HW.shape[-1]
        x, y = pixel_grid(len(self.draws), size, self.image_B3HW.device)
        grid = torch.stack((x + dx, y + dy), dim=-1) * (2 / size)
        return F.grid_sample(
            self.image_B3HW, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )


Mark = tuple[Tensor, Tensor]
Renderer = Callable[[Site], Mark]


def _centre_on_part(draws: Draws, part_BHW: Tensor) -> Tensor:
    """(B, 2) pixels from the centre: the first of some random places that lies on the part."""
    size = part_BHW.shape[-1]
    place = (draws.uniform(_CANDIDATES, 2, low=0.06, high=0.94) * size).long()
    on_part = part_BHW.flatten(1).gather(1, place[..., 1] * size + place[..., 0])
    first = on_part.float().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    return place.gather(1, first)[:, 0].float() - (size - 1) / 2


def _taper(site: Site, length: Tensor) -> Tensor:
    return step(site.x.abs(), length, length * 0.7)


def scratch(site: Site) -> Mark:
    """A thin, slightly bent line."""
    length = site.radius * 1.5
    bent = site.y - site.amount(-0.4, 0.4) * site.x**2 / length
    alpha = line(bent, site.amount(0.1, 0.9)) * _taper(site, length) * site.amount(0.6, 1.0)
    return alpha, site.image_B3HW + site.contrast(0.2, 0.6)


def crack(site: Site) -> Mark:
    """A dark jagged line with a branch."""
    length = site.radius * 1.5
    jag = fractal(site.draws, site.x / 6, torch.zeros_like(site.x), octaves=3, gain=0.7)
    trunk = site.y - jag * site.amount(1.5, 5.0)
    slope = site.amount(0.3, 1.2) * site.draws.sign()[:, None, None]
    branch = torch.where(site.x > 0, trunk - slope * site.x, torch.full_like(trunk, 99.0))
    width = site.amount(0.0, 0.9)
    alpha = torch.maximum(line(trunk, width), line(branch, width * 0.5)) * _taper(site, length)
    return alpha, site.image_B3HW * site.amount(0.1, 0.5)[:, None]


def pit(site: Site) -> Mark:
    """A round hole with a lit rim."""
    x, y = site.unit()
    distance = torch.hypot(x, y)
    alpha = step(distance, 1.0, 0.8)
    depth = step(distance, 0.9, 0.5)[:, None]
    rim = (1 - depth) * (x[:, None] * 0.5)
    floor = site.image_B3HW * site.amount(0.05, 0.45)[:, None]
    return alpha, torch.lerp(site.image_B3HW + rim, floor, depth)


def dent(site: Site) -> Mark:
    """The shading of a bulge or a hollow."""
    x, y = site.unit(1.3)
    height = blob(site.draws, x, y, 0.3)
    alpha = step(height, 1.0, 0.6)
    slope = x * torch.exp(-2 * (x**2 + y**2)) * 2.5
    return alpha, site.image_B3HW * (1 + site.contrast(0.35, 0.9) * slope[:, None])


def stain(site: Site) -> Mark:
    """An irregular tinted spot with a soft edge, through which the surface shows."""
    alpha = site.region(roughness=0.9, softness=site.amount(0.15, 0.7), stretch=1.2)
    tinted = site.image_B3HW * (1 + site.contrast(0.2, 0.6)) + site.hue(0.2)
    return alpha * site.amount(0.6, 1.0), tinted


def chip(site: Site) -> Mark:
    """An angular piece broken away, showing a rough inside."""
    angle = torch.atan2(site.y, site.x) * 1.2
    edge = fractal(site.draws, angle, torch.zeros_like(angle), octaves=2, gain=0.8)
    distance = torch.hypot(*site.unit()) * (1 + 0.6 * edge)
    inside = fractal(site.draws, site.x / 3, site.y / 3, octaves=2)[:, None]
    shade = site.amount(0.05, 0.95)[:, None]
    return step(distance, 1.0, 0.85), (shade + 0.2 * inside + site.hue(0.05)).expand_as(
        site.image_B3HW
    )


def fibre(site: Site) -> Mark:
    """A long curled thread that lies on the surface."""
    length = site.radius * 2.2
    curl = site.radius * site.amount(0.2, 0.7)
    wave = curl * torch.sin(site.x / curl * 0.9 + site.amount(0, 6.28))
    alpha = line((site.y - wave) * 0.8, site.amount(0.2, 0.9)) * _taper(site, length)
    colour = site.amount(0.05, 0.95)[:, None] + site.hue(0.3)
    return alpha, colour.expand_as(site.image_B3HW)


def particle(site: Site) -> Mark:
    """A small foreign body with a texture of its own."""
    distance = blob(site.draws, *site.unit(), 0.6) * 1.6
    texture = fractal(site.draws, site.x / 2.5, site.y / 2.5, octaves=2)[:, None]
    light = 0.15 * (site.x / site.radius)[:, None]
    colour = site.amount(0.1, 0.9)[:, None] + site.hue(0.3) + 0.2 * texture + light
    return step(distance, 1.0, 0.8), colour.expand_as(site.image_B3HW)


def pores(site: Site) -> Mark:
    """A cluster of tiny dark or bright dots."""
    near = step(torch.hypot(*site.unit()), 1.2, 0.6)
    dots = noise(site.draws, site.x / 2.2, site.y / 2.2)
    alpha = step(dots, 0.66, 0.78) * (near > 0.35)
    return alpha, site.image_B3HW + site.contrast(0.3, 0.7)


def discolour(site: Site) -> Mark:
    """A wide region of a slightly different colour or brightness."""
    alpha = site.region(roughness=0.5, softness=0.5, stretch=1.8)
    return alpha, site.image_B3HW + site.contrast(0.07, 0.25) + site.hue(0.15)


def smear(site: Site) -> Mark:
    """Texture dragged along one direction."""
    reach = site.radius.clamp(max=12.0)
    dx, dy = site.direction[:, 0, None, None], site.direction[:, 1, None, None]
    offsets = (-0.9, -0.45, 0.0, 0.45, 0.9)
    dragged = sum(
        (site.shifted(offset * reach * dx, offset * reach * dy) for offset in offsets),
        start=torch.zeros_like(site.image_B3HW),
    )
    alpha = site.region(roughness=0.4, softness=0.3, stretch=1.6)
    return alpha, dragged / len(offsets) + 0.3 * site.contrast(0.1, 0.4)


def warp(site: Site) -> Mark:
    """The pattern displaced or twisted out of place."""
    falloff = step(torch.hypot(*site.unit()), 1.0, 0.2) * site.radius * site.amount(0.3, 0.6)
    turn = site.amount(-0.35, 0.35) * (falloff > 0)
    dx = falloff * site.direction[:, 1, None, None] + turn * site.y
    dy = -falloff * site.direction[:, 0, None, None] - turn * site.x
    moved = site.shifted(dx, dy)
    return step(torch.hypot(*site.unit()), 1.0, 0.85), moved


def burn(site: Site) -> Mark:
    """A dark centre in a brownish halo."""
    distance = blob(site.draws, *site.unit(), 0.5)
    heat = step(distance, 1.0, 0.1)[:, None]
    brown = torch.tensor((0.25, 0.0, -0.25), device=heat.device)[:, None, None]
    tint = 0.65 + brown * site.is_coloured
    scorched = site.image_B3HW * torch.lerp(torch.ones_like(heat), tint, heat) * (1 - 0.75 * heat)
    return step(distance, 1.0, 0.75), scorched


def worn(site: Site) -> Mark:
    """Texture rubbed away to the mean colour of its surroundings."""
    alpha = site.region(roughness=0.7, softness=0.3, stretch=1.4)
    return alpha * site.amount(0.75, 1.0), site.mean_colour() + 0.2 * site.contrast(0.1, 0.5)


def splice(site: Site) -> Mark:
    """The other material of the picture where it does not belong: a spur, a bridge, a gap, a bite
    or a pinhole, depending on where it lies."""
    reach = site.radius.clamp(max=6.0)
    stretch = site.amount(0.4, 1.6)
    x, y = site.x / stretch, site.y
    distance = torch.where(
        site.draws.chance(0.5)[:, None, None],
        torch.hypot(x, y) * (1 + 0.3 * fractal(site.draws, x / 3, y / 3, octaves=1)),
        torch.maximum(x.abs(), y.abs()),
    )
    return (reach + 0.5 - distance).clamp(0, 1), _either_tone(site)


def _either_tone(site: Site) -> Tensor:
    """A dark or a bright colour that the picture shows elsewhere."""
    # Every 16th pixel is enough to find both tones, and a sixteenth of the sort.
    pixels_BP3 = site.image_B3HW[..., ::4, ::4].flatten(2).mT
    order_BP = pixels_BP3.mean(-1).argsort(dim=1)
    count = order_BP.shape[1]
    rows_B = torch.arange(len(order_BP), device=order_BP.device)
    tones = [pixels_BP3[rows_B, order_BP[:, int(share * count)]] for share in (0.06, 0.94)]
    dark, bright = (tone[:, :, None, None] for tone in tones)
    paint = torch.where(site.draws.chance(0.5)[:, None, None, None], dark, bright)
    return paint.expand_as(site.image_B3HW)


def dead_area(site: Site) -> Mark:
    """A sharply and straightly bounded region of another brightness."""
    x, y = site.unit(1.5)
    turn = site.amount(-0.6, 0.6)
    inside = torch.maximum(torch.maximum(x.abs(), y.abs()), (x * turn.cos() + y * turn.sin()) * 1.3)
    return step(inside, 1.0, 0.93), site.image_B3HW * (1 + site.contrast(0.15, 0.6))


def dashes(site: Site) -> Mark:
    """A few short thin parallel lines, as of interrupted fingers."""
    gap = site.amount(2.5, 7.0)
    row = fraction(site.y / gap) * gap
    length = site.radius * (0.6 + 0.5 * noise(site.draws, site.y / gap / 1.0, site.y * 0))
    near = step(site.y.abs(), site.radius * 0.8, site.radius * 0.6)
    alpha = line(row, site.amount(0.1, 0.8)) * step(site.x.abs(), length, length - 1) * near
    return alpha, site.image_B3HW * (1 + site.contrast(0.2, 0.6))


def uneven(site: Site) -> Mark:
    """A wide, soft change of brightness over a good part of the picture."""
    spread = site.image_B3HW.shape[-1] * site.amount(0.15, 0.45) / site.radius
    x, y = (axis / spread for axis in site.unit(1.5))
    alpha = step(blob(site.draws, x, y, 0.5), 1.0, 0.3)
    return alpha, site.image_B3HW + site.contrast(0.12, 0.35)


def bridge(site: Site) -> Mark:
    """A short straight bar in one of the picture's two tones: it joins or parts what it crosses."""
    width = site.amount(0.3, 1.6)
    length = site.radius.clamp(max=9.0)
    along = (length + 0.5 - site.x.abs()).clamp(0, 1)
    return line(site.y, width) * along, _either_tone(site)


def graft(site: Site) -> Mark:
    """A wide, sharply outlined region of another texture and brightness."""
    reach = site.radius * site.amount(1.0, 2.0)
    distance = blob(site.draws, site.x / (reach * 1.8), site.y / reach, 0.5)
    cell, stretch = site.amount(1.5, 7.0), site.amount(0.15, 1.0)
    texture = fractal(site.draws, site.x / cell, site.y / cell * stretch, octaves=3)[:, None]
    ground = site.mean_colour().mean((2, 3), keepdim=True)
    paint = ground + 0.4 * site.contrast(0.05, 0.7) + site.amount(0.0, 0.15)[:, None] * texture
    return step(distance, 1.0, 0.94), torch.lerp(
        site.image_B3HW, paint, site.amount(0.5, 1.0)[:, None]
    )


def shade(site: Site) -> Mark:
    """Half of the picture, up to a nearly straight outline, of another brightness and grain."""
    bend = fractal(site.draws, site.x / 25, site.y / 25, octaves=2) * site.amount(0.0, 8.0)
    alpha = step(site.x + bend, 0.0, site.amount(0.8, 12.0))
    softer = torch.lerp(site.image_B3HW, site.mean_colour(), site.amount(0.0, 0.8)[:, None])
    return alpha, softer * (1 + site.contrast(0.12, 0.5))


def bubble(site: Site) -> Mark:
    """A blister: a ring with a highlight."""
    x, y = site.unit()
    distance = torch.hypot(x, y)
    ring = step((distance - 0.8).abs(), 0.2, 0.05)[:, None]
    light = torch.exp(-12 * ((x - 0.35) ** 2 + (y - 0.2) ** 2))[:, None]
    return step(distance, 1.0, 0.9), site.image_B3HW * (1 - 0.5 * ring) + 0.6 * light


def fold(site: Site) -> Mark:
    """A crease: a dark edge beside a bright one."""
    length = site.radius * 1.6
    bent = site.y + site.amount(-0.3, 0.3) * site.x**2 / length
    width = site.amount(1.5, 4.0)
    profile = (bent / width) * torch.exp(-((bent / width) ** 2))
    alpha = step(bent.abs(), width * 2.2, width * 1.6) * _taper(site, length)
    return alpha, site.image_B3HW * (1 + 2.0 * site.amount(0.4, 0.9) * profile)[:, None]


def nick(site: Site) -> Mark:
    """A small wedge cut into what lies there, dark on one flank and bright on the other."""
    x, y = site.unit()
    depth = site.radius.clamp(max=8.0) / site.radius
    x, y = x / depth, y / depth
    wedge = torch.maximum(y.abs() * 2.5 - (1 - x) * 0.6, -x - 0.6)
    flank = torch.where(y > 0, 1.0, -1.0)[:, None] * site.amount(0.15, 0.5)[:, None]
    return step(wedge, 0.1, 0.0), site.image_B3HW + flank


def haze(site: Site) -> Mark:
    """A veil that takes contrast away and brightens a little."""
    alpha = site.region(roughness=0.6, softness=site.amount(0.3, 0.9), stretch=1.5)
    veil = torch.lerp(site.image_B3HW, site.mean_colour(), 0.5)
    return alpha, veil + site.amount(0.08, 0.25)[:, None]


def corrosion(site: Site) -> Mark:
    """Eaten, fractal patches."""
    near = 1 - torch.hypot(*site.unit(1.4))
    eaten = fractal(site.draws, site.x / 8, site.y / 8, octaves=4, gain=0.8)
    alpha = step(near + 0.8 * eaten, 0.15, 0.3)
    grit = fractal(site.draws, site.x / 2, site.y / 2, octaves=1)[:, None]
    rusty = torch.tensor((0.1, -0.05, -0.15), device=grit.device)[:, None, None]
    return alpha, site.image_B3HW * (0.65 + 0.5 * grit) + rusty * site.is_coloured


TRAINING_DEFECTS: dict[str, Renderer] = {
    "scratch": scratch,
    "crack": crack,
    "pit": pit,
    "dent": dent,
    "stain": stain,
    "chip": chip,
    "fibre": fibre,
    "particle": particle,
    "pores": pores,
    "discolour": discolour,
    "smear": smear,
    "warp": warp,
    "burn": burn,
    "worn": worn,
    "splice": splice,
    "dead area": dead_area,
    "dashes": dashes,
    "uneven": uneven,
    "bridge": bridge,
    "graft": graft,
    "shade": shade,
}
HELD_OUT_DEFECTS: dict[str, Renderer] = {
    "bubble": bubble,
    "fold": fold,
    "corrosion": corrosion,
    "nick": nick,
    "haze": haze,
}
DEFECTS = TRAINING_DEFECTS | HELD_OUT_DEFECTS

VISIBLE = 0.06
"""Root mean square difference (of 1) that a defect has at least."""
_MAX_GAIN = 4.0
_SEEN = 0.02


def draw_defect(
    render: Renderer, draws: Draws, image_B3HW: Tensor, part_BHW: Tensor
) -> tuple[Tensor, Tensor]:
    """The pictures with one more defect on the part, and the mask (B, H, W) bool of where it acts.

    Faint differences are amplified to `VISIBLE`; where even that does not show them (texture
    rubbed away where there was none), nothing is drawn and the mask is empty.
    """
    alpha, paint = render(Site(draws, image_B3HW, part_BHW))
    alpha = ((alpha - _MIN_ALPHA) / (1 - _MIN_ALPHA)).clamp(0, 1) * part_BHW
    change = alpha[:, None] * (paint.clamp(0, 1) - image_B3HW)
    area = (alpha > 0).flatten(1).sum(1).clamp(min=1)
    strength = (change.square().mean(1).flatten(1).sum(1) / area).sqrt()
    gain = (VISIBLE / strength.clamp(min=1e-4)).clamp(min=1)
    gain = per_image(torch.where(gain <= _MAX_GAIN, gain, 0.0))
    marked_B3HW = (image_B3HW + gain[:, None] * change).clamp(0, 1)
    # A mark that happens to have the colour below it is no defect there; its neighbours are.
    seen_B1HW = ((marked_B3HW - image_B3HW).abs().amax(1, keepdim=True) > _SEEN).float()
    closed_BHW = F.max_pool2d(seen_B1HW, 3, stride=1, padding=1)[:, 0] > 0
    mask_BHW = closed_BHW & (alpha > 0)
    return torch.where(mask_BHW[:, None], marked_B3HW, image_B3HW), mask_BHW
