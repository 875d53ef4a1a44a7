"""Where self-generated anomalies lie: random regions of an image.

Regions are `(B, H, W)` bool masks. Their area varies log-uniformly, since small defects matter
most. All functions draw from the generator that they are given, on the CPU.

B images, H, W pixels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def uniform(low: float, high: float, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def coordinates(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres `(H, 1)` and `(1, W)` in 0..1."""
    height, width = size
    return (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width) + 0.5) / width


Range = tuple[float, float]

_AREAS: Range = (0.006, 0.12)


def _areas(batch: int, g: torch.Generator, areas: Range = _AREAS) -> torch.Tensor:
    low, high = areas
    return torch.exp(uniform(math.log(low), math.log(high), (batch,), g))


def smooth_noise(batch: int, size: tuple[int, int], cells: int, g: torch.Generator) -> torch.Tensor:
    """Smooth random fields `(B, H, W)` with about `cells` bumps a side."""
    coarse_B1hw = torch.randn(batch, 1, cells, cells, generator=g)
    return F.interpolate(coarse_B1hw, size=size, mode="bicubic", align_corners=False)[:, 0]


def blob(
    batch: int, size: tuple[int, int], g: torch.Generator, areas: Range = _AREAS
) -> torch.Tensor:
    """One ragged spot: smooth noise that is higher near a random centre, cut at its area, whose
    share of the image lies in a range."""
    y_H1, x_W = coordinates(size)
    centre_2B11 = uniform(0.1, 0.9, (2, batch, 1, 1), g)
    distance_BHW = torch.hypot(y_H1 - centre_2B11[0], x_W - centre_2B11[1])
    field_BHW = 0.08 * smooth_noise(batch, size, 8, g) - distance_BHW
    pixels = field_BHW[0].numel()
    threshold_B = torch.stack(
        [
            field_HW.flatten().kthvalue(1 + int((1 - area) * (pixels - 1))).values
            for field_HW, area in zip(field_BHW, _areas(batch, g, areas).tolist(), strict=True)
        ]
    )
    return field_BHW > threshold_B[:, None, None]


def ellipse(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """One ellipse of random place, angle and aspect."""
    y_H1, x_W = coordinates(size)
    centre_2B11 = uniform(0.1, 0.9, (2, batch, 1, 1), g)
    angle_B11 = uniform(0, math.pi, (batch, 1, 1), g)
    aspect_B11 = torch.exp(uniform(-1.0, 1.0, (batch, 1, 1), g))
    radius_B11 = (_areas(batch, g)[:, None, None] / math.pi).sqrt()
    dy_BHW, dx_BHW = y_H1 - centre_2B11[0], x_W - centre_2B11[1]
    u_BHW = angle_B11.cos() * dx_BHW + angle_B11.sin() * dy_BHW
    v_BHW = angle_B11.cos() * dy_BHW - angle_B11.sin() * dx_BHW
    return (u_BHW / aspect_B11.sqrt()) ** 2 + (v_BHW * aspect_B11.sqrt()) ** 2 < radius_B11**2


def polyline(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """One bent line of 3 segments, about 1 to 4 percent of the image wide."""
    return walk(batch, size, g, width=(0.006, 0.02), turn=0.7, length=(0.08, 0.25), segments=3)


def walk(
    batch: int,
    size: tuple[int, int],
    g: torch.Generator,
    *,
    width: Range,
    turn: float,
    length: Range,
    segments: int = 6,
) -> torch.Tensor:
    """One line of straight segments.

    Args:
        width: half of it, as a share of the image's side.
        turn: between segments at most, in radians.
        length: of a segment, as a share of the image's side.
    """
    y_H1, x_W = coordinates(size)
    start_2B = uniform(0.15, 0.85, (2, batch), g)
    heading_B = uniform(0, 2 * math.pi, (batch,), g)
    half_width_B11 = uniform(*width, (batch, 1, 1), g)
    nearest_BHW = torch.full((batch, *size), torch.inf)
    for _ in range(segments):
        heading_B = heading_B + uniform(-turn, turn, (batch,), g)
        length_B = uniform(*length, (batch,), g)
        step_2B = length_B * torch.stack([heading_B.sin(), heading_B.cos()])
        dy_BHW, dx_BHW = y_H1 - start_2B[0, :, None, None], x_W - start_2B[1, :, None, None]
        step_y_B11, step_x_B11 = step_2B[0, :, None, None], step_2B[1, :, None, None]
        along_BHW = (dy_BHW * step_y_B11 + dx_BHW * step_x_B11) / length_B[:, None, None] ** 2
        along_BHW = along_BHW.clamp(0, 1)
        distance_BHW = torch.hypot(dy_BHW - along_BHW * step_y_B11, dx_BHW - along_BHW * step_x_B11)
        nearest_BHW = torch.minimum(nearest_BHW, distance_BHW)
        start_2B = start_2B + step_2B
    return nearest_BHW < half_width_B11


Region = Callable[[int, tuple[int, int], torch.Generator], torch.Tensor]


REGIONS: tuple[Region, ...] = (blob, ellipse, polyline)


def random_regions(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """`(B, H, W)` masks that take turns through all kinds of region."""
    kinds = torch.stack([region(batch, size, g) for region in REGIONS])
    turn_B = (torch.arange(batch) + torch.randint(len(REGIONS), (1,), generator=g)) % len(REGIONS)
    return kinds[turn_B, torch.arange(batch)]


def move_onto(
    region_BHW: torch.Tensor, object_BHW: torch.Tensor, g: torch.Generator
) -> torch.Tensor:
    """Regions shifted so that they lie on the object, and cut by its outline.

    Where the object is the whole image a region stays as it is.
    """
    moved = []
    for region_HW, object_HW in zip(region_BHW, object_BHW, strict=True):
        if object_HW.all():
            moved.append(region_HW)
            continue
        place_X2 = object_HW.nonzero()
        target_2 = place_X2[int(torch.randint(len(place_X2), (), generator=g))]
        centre_2 = region_HW.nonzero().double().mean(0).round().long()
        shift = (target_2 - centre_2).tolist()
        moved.append(region_HW.roll(shift, dims=(0, 1)) & object_HW)
    return torch.stack(moved)
