"""Self-generated anomalies: regions, noise, and the perturbation families that judge a prompt set.

The prompts learn from noise alone. Two further sets of families, which share no renderer with the
noise or with one another, are never trained on: `GUIDANCE` decides whether the meta-prompt may
follow the learned prompts, `SELECTION` scores a trial.

B images, H, W pixels, N patches. Pixels are float32 in 0..1. All functions draw from the
generator that they are given, on the CPU.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

ANOMALOUS_COVERAGE = 0.25
"""A patch is anomalous if at least this share of it is covered, and ignored if less of it is."""

IGNORED = -1

VISIBLE_CHANGE = 0.03
"""A pixel counts as changed if a channel moved by more than this: about 8 of 255 gray levels."""


class Perturbed(NamedTuple):
    """Perturbed pixels `(B, 3, H, W)` in 0..1 and the mask `(B, H, W)` of pixels that changed."""

    pixels_B3HW: torch.Tensor
    mask_BHW: torch.Tensor


def patch_labels(mask_BHW: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Masks -> `(B, N)` int8: 1 anomalous, 0 normal, -1 ignored (touched, but too little)."""
    coverage_BN = F.adaptive_avg_pool2d(mask_BHW.float()[:, None], grid).flatten(1)
    labels_BN = torch.where(coverage_BN > 0, IGNORED, 0)
    return labels_BN.masked_fill(coverage_BN >= ANOMALOUS_COVERAGE, 1).to(torch.int8)


def add_noise(
    pixels_B3HW: torch.Tensor, mask_BHW: torch.Tensor, noise_B3HW: torch.Tensor, strength: float
) -> torch.Tensor:
    """Pixels with `strength` times the unit noise added inside the mask, clamped to 0..1."""
    noisy_B3HW = pixels_B3HW + strength * noise_B3HW * mask_BHW[:, None]
    return _keep_gray(pixels_B3HW, noisy_B3HW.clamp(0, 1))


# Regions: (B, H, W) bool masks. Their area varies log-uniformly, since small defects matter most.


def _uniform(low: float, high: float, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _coordinates(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres `(H, 1)` and `(1, W)` in 0..1."""
    height, width = size
    return (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width) + 0.5) / width


def _areas(batch: int, g: torch.Generator, low: float = 0.006, high: float = 0.12) -> torch.Tensor:
    return torch.exp(_uniform(math.log(low), math.log(high), (batch,), g))


def smooth_noise(batch: int, size: tuple[int, int], cells: int, g: torch.Generator) -> torch.Tensor:
    """Smooth random fields `(B, H, W)` with about `cells` bumps a side."""
    coarse_B1hw = torch.randn(batch, 1, cells, cells, generator=g)
    return F.interpolate(coarse_B1hw, size=size, mode="bicubic", align_corners=False)[:, 0]


def blob(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """One ragged spot: smooth noise that is higher near a random centre, cut at its area."""
    y_H1, x_W = _coordinates(size)
    centre_2B11 = _uniform(0.1, 0.9, (2, batch, 1, 1), g)
    distance_BHW = torch.hypot(y_H1 - centre_2B11[0], x_W - centre_2B11[1])
    field_BHW = 0.08 * smooth_noise(batch, size, 8, g) - distance_BHW
    threshold_B = torch.stack(
        [
            torch.quantile(field_HW, 1 - area)
            for field_HW, area in zip(field_BHW, _areas(batch, g), strict=True)
        ]
    )
    return field_BHW > threshold_B[:, None, None]


def ellipse(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """One ellipse of random place, angle and aspect."""
    y_H1, x_W = _coordinates(size)
    centre_2B11 = _uniform(0.1, 0.9, (2, batch, 1, 1), g)
    angle_B11 = _uniform(0, math.pi, (batch, 1, 1), g)
    aspect_B11 = torch.exp(_uniform(-1.0, 1.0, (batch, 1, 1), g))
    radius_B11 = (_areas(batch, g)[:, None, None] / math.pi).sqrt()
    dy_BHW, dx_BHW = y_H1 - centre_2B11[0], x_W - centre_2B11[1]
    u_BHW = angle_B11.cos() * dx_BHW + angle_B11.sin() * dy_BHW
    v_BHW = angle_B11.cos() * dy_BHW - angle_B11.sin() * dx_BHW
    return (u_BHW / aspect_B11.sqrt()) ** 2 + (v_BHW * aspect_B11.sqrt()) ** 2 < radius_B11**2


def polyline(batch: int, size: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """One bent line of 3 segments, about 1 to 4 percent of the image wide."""
    y_H1, x_W = _coordinates(size)
    start_2B = _uniform(0.15, 0.85, (2, batch), g)
    heading_B = _uniform(0, 2 * math.pi, (batch,), g)
    half_width_B11 = _uniform(0.006, 0.02, (batch, 1, 1), g)
    nearest_BHW = torch.full((batch, *size), torch.inf)
    for _ in range(3):
        heading_B = heading_B + _uniform(-0.7, 0.7, (batch,), g)
        length_B = _uniform(0.08, 0.25, (batch,), g)
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


# Perturbation families. Each replaces the pixels of a region; `_blend` finds what visibly changed.


def _keep_gray(pixels_B3HW: torch.Tensor, replacement_B3HW: torch.Tensor) -> torch.Tensor:
    """The replacement, gray where the image is gray: else colour alone would give it away."""
    spread_B = (pixels_B3HW.amax(1) - pixels_B3HW.amin(1)).flatten(1).amax(1)
    is_gray_B111 = (spread_B < 0.01)[:, None, None, None]
    return torch.where(is_gray_B111, replacement_B3HW.mean(1, keepdim=True), replacement_B3HW)


def _blend(pixels: torch.Tensor, replacement: torch.Tensor, mask_BHW: torch.Tensor) -> Perturbed:
    replacement = _keep_gray(pixels, replacement)
    blended = torch.where(mask_BHW[:, None], replacement.clamp(0, 1), pixels)
    changed_BHW = (blended - pixels).abs().amax(1) > VISIBLE_CHANGE
    return Perturbed(blended, changed_BHW)


def _size(pixels_B3HW: torch.Tensor) -> tuple[int, int]:
    return pixels_B3HW.shape[-2], pixels_B3HW.shape[-1]


def _gaussian_blur(pixels_B3HW: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels_B3HW, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _displace(pixels_B3HW: torch.Tensor, shift_BHW2: torch.Tensor) -> torch.Tensor:
    """Pixels read at their own place plus `shift_BHW2` (x, y), in units of half an image."""
    height, width = _size(pixels_B3HW)
    y_H1, x_W = _coordinates((height, width))
    own_HW2 = torch.stack([(2 * x_W - 1).expand(height, -1), (2 * y_H1 - 1).expand(-1, width)], -1)
    return F.grid_sample(
        pixels_B3HW, own_HW2 + shift_BHW2, padding_mode="reflection", align_corners=False
    )


def cut_and_paste(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A piece from elsewhere in the same image."""
    batch, size = len(pixels), _size(pixels)
    angle_B = _uniform(0, 2 * math.pi, (batch,), g)
    shift_B2 = _uniform(0.4, 1.2, (batch, 1), g) * torch.stack([angle_B.cos(), angle_B.sin()], -1)
    moved = _displace(pixels, shift_B2[:, None, None].expand(batch, *size, 2))
    return _blend(pixels, moved, ellipse(batch, size, g))


def scratch(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A thin line, lighter or darker than what lies under it."""
    batch = len(pixels)
    sign_B111 = torch.randint(2, (batch, 1, 1, 1), generator=g) * 2.0 - 1
    moved = pixels + sign_B111 * _uniform(0.15, 0.5, (batch, 1, 1, 1), g)
    return _blend(pixels, moved, polyline(batch, _size(pixels), g))


def blot(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A spot of one colour, half transparent."""
    batch = len(pixels)
    colour_B311 = _uniform(0, 1, (batch, 3, 1, 1), g)
    opacity_B111 = _uniform(0.4, 0.9, (batch, 1, 1, 1), g)
    return _blend(
        pixels, torch.lerp(pixels, colour_B311, opacity_B111), blob(batch, _size(pixels), g)
    )


def erase(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A part that is missing: the image's own median colour stands in its place."""
    median_B311 = pixels.flatten(2).median(-1).values[..., None, None]
    grain = 0.02 * torch.randn(pixels.shape, generator=g)
    return _blend(pixels, median_B311 + grain, blob(len(pixels), _size(pixels), g))


def blur(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A smeared place."""
    sigma = 0.025 * pixels.shape[-1]
    return _blend(pixels, _gaussian_blur(pixels, sigma), ellipse(len(pixels), _size(pixels), g))


def colour_shift(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place of another tint."""
    batch = len(pixels)
    shift_B311 = torch.randn(batch, 3, 1, 1, generator=g)
    shift_B311 = 0.3 * shift_B311 / shift_B311.norm(dim=1, keepdim=True)
    return _blend(pixels, pixels + shift_B311, ellipse(batch, _size(pixels), g))


def warp(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A dented place: its pixels are moved by a smooth field."""
    batch, size = len(pixels), _size(pixels)
    shift_BHW2 = 0.12 * torch.stack([smooth_noise(batch, size, 10, g) for _ in "xy"], -1)
    return _blend(pixels, _displace(pixels, shift_BHW2), blob(batch, size, g))


def speckle(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """Black and white grains."""
    batch, size = len(pixels), _size(pixels)
    value_B1HW = torch.rand(batch, 1, *size, generator=g)
    grains = torch.where(value_B1HW < 0.2, 0.0, torch.where(value_B1HW > 0.8, 1.0, pixels))
    return _blend(pixels, grains, blob(batch, size, g))


def stripes(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A periodic pattern laid over the surface."""
    batch, size = len(pixels), _size(pixels)
    y_H1, x_W = _coordinates(size)
    angle_B11 = _uniform(0, math.pi, (batch, 1, 1), g)
    cycles_B11 = _uniform(12, 30, (batch, 1, 1), g)
    phase_BHW = cycles_B11 * (angle_B11.cos() * x_W + angle_B11.sin() * y_H1)
    wave_B1HW = torch.sin(2 * math.pi * phase_BHW)[:, None]
    return _blend(pixels, pixels + 0.25 * wave_B1HW, ellipse(batch, size, g))


def shade(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A lighter or darker place with a soft edge."""
    batch, size = len(pixels), _size(pixels)
    sign_B111 = torch.randint(2, (batch, 1, 1, 1), generator=g) * 2.0 - 1
    mask_B3HW = ellipse(batch, size, g)[:, None].float().expand(-1, 3, -1, -1)
    soft_B3HW = _gaussian_blur(mask_B3HW, 0.02 * size[1])
    everywhere_BHW = torch.ones(batch, *size, dtype=torch.bool)
    return _blend(pixels, pixels + 0.35 * sign_B111 * soft_B3HW, everywhere_BHW)


def fade(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place that lost its contrast."""
    coarse = _gaussian_blur(pixels, 0.06 * pixels.shape[-1])
    return _blend(pixels, coarse, blob(len(pixels), _size(pixels), g))


def shuffle(pixels: torch.Tensor, g: torch.Generator) -> Perturbed:
    """A place whose pixels were mixed up."""
    batch, size = len(pixels), _size(pixels)
    shift_BHW2 = 0.25 * torch.randn(batch, *size, 2, generator=g)
    return _blend(pixels, _displace(pixels, shift_BHW2), ellipse(batch, size, g))


Family = Callable[[torch.Tensor, torch.Generator], Perturbed]

GUIDANCE: Mapping[str, Family] = {
    "speckle": speckle,
    "stripes": stripes,
    "shade": shade,
    "fade": fade,
    "shuffle": shuffle,
}

SELECTION: Mapping[str, Family] = {
    "cut_and_paste": cut_and_paste,
    "scratch": scratch,
    "blot": blot,
    "erase": erase,
    "blur": blur,
    "colour_shift": colour_shift,
    "warp": warp,
}


def harmless_copies(pixels: torch.Tensor, copies: int, g: torch.Generator) -> torch.Tensor:
    """`copies` of each image, slightly turned, enlarged, shifted and relit: still normal.

    Args:
        pixels: `(B, 3, H, W)`.

    Returns:
        `(B * copies, 3, H, W)`, the copies of one image side by side.
    """
    repeated = pixels.repeat_interleave(copies, 0)
    batch, size = len(repeated), _size(repeated)
    angle_B = _uniform(-0.09, 0.09, (batch,), g)
    zoom_B = _uniform(0.88, 0.98, (batch,), g)
    move_B2 = _uniform(-0.04, 0.04, (batch, 2), g)
    cos_B, sin_B = zoom_B * angle_B.cos(), zoom_B * angle_B.sin()
    affine_B23 = torch.stack(
        [
            torch.stack([cos_B, -sin_B, move_B2[:, 0]], -1),
            torch.stack([sin_B, cos_B, move_B2[:, 1]], -1),
        ],
        1,
    )
    grid = F.affine_grid(affine_B23, [batch, 3, *size], align_corners=False)
    turned = F.grid_sample(repeated, grid, padding_mode="reflection", align_corners=False)
    gain_B111 = _uniform(0.94, 1.06, (batch, 1, 1, 1), g)
    return (gain_B111 * turned).clamp(0, 1)
