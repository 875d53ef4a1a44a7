"""What every renderer works with: the streams of style and pose, the grid, and a palette.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import fractal, per_image, pixel_grid, rotate, step


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
