"""Pairs of pictures of one product, one of them possibly defective, with masks and attributes.

Everything is a tensor operation over the batch, and every pair depends on its own seed alone.

Shapes: P pairs, A attributes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from apt_ray.pretraining.defects import DEFECTS, TRAINING_DEFECTS, draw_defect
from apt_ray.pretraining.draws import Draws
from apt_ray.pretraining.fields import region
from apt_ray.pretraining.nuisances import add_dirt, cut_off, light, orient, recolour
from apt_ray.pretraining.surfaces import SURFACES, TRAINING_SURFACES, Scene

MAX_DEFECTS = 3
COMPOUND_RATE = 0.2
"""Share of the pairs that show two kinds of surface."""
DEFECT_NAMES = tuple(DEFECTS)
SURFACE_NAMES = tuple(SURFACES)


class Attribute(IntEnum):
    """Columns of the attribute table; 0 says "none" for what only a defect has."""

    SURFACE = 0  # index into SURFACE_NAMES
    COLOUR = 1  # index into captions.COLOURS
    STATE = 2  # 0 normal, 1 anomalous
    DEFECT = 3  # 1 + index into DEFECT_NAMES
    POLARITY = 4  # 1 darker, 2 brighter than what it covers
    EXTENT = 5  # 1 small, 2 medium, 3 large
    COUNT = 6  # 1 to MAX_DEFECTS
    PLACE = 7  # 1 + 3 * row + column of the thirds of the picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """A batch of pairs.

    `reference_P3HW` and `query_P3HW` are float32 in 0..1; the reference is always normal.
    `mask_PHW` (bool) is true where a defect acts on the query; `attributes_PA` (int64) describes
    the query, its columns are `Attribute`.
    """

    reference_P3HW: Tensor
    query_P3HW: Tensor
    mask_PHW: Tensor
    attributes_PA: Tensor

    def __len__(self) -> int:
        return len(self.mask_PHW)

    def __getitem__(self, index: slice) -> Pairs:
        return Pairs(
            reference_P3HW=self.reference_P3HW[index],
            query_P3HW=self.query_P3HW[index],
            mask_PHW=self.mask_PHW[index],
            attributes_PA=self.attributes_PA[index],
        )

    def split(self, count: int) -> list[Pairs]:
        """Batches of `count` pairs, the last one perhaps smaller."""
        return [self[start : start + count] for start in range(0, len(self), count)]


def generate(
    seeds_P: Tensor,
    *,
    size: int,
    surfaces: Sequence[str] = tuple(TRAINING_SURFACES),
    defects: Sequence[str] = tuple(TRAINING_DEFECTS),
    defect_rate: float = 0.7,
    product_seeds_P: Tensor | None = None,
) -> Pairs:
    """Draw one pair a seed (int64) of `size` pixels a side, on the device of the seeds.

    With another `defect_rate` the same seeds give the same pictures with other queries defective;
    with 0 they are the pictures before the defects were drawn. Pairs of one `product_seeds_P` show
    one product: its kind and style are drawn from these seeds, pose and defects from the others.
    """
    draws = Draws.from_seeds(seeds_P)
    product = draws if product_seeds_P is None else Draws.from_seeds(product_seeds_P)
    style, choice = product.fork(0), draws.fork(1)
    surface_P = _choose(product.fork(6), surfaces, SURFACE_NAMES)
    defect_P = _choose(choice, defects, DEFECT_NAMES)
    count_P = 1 + (choice.uniform() ** 2 * MAX_DEFECTS).long()
    count_P = count_P * choice.chance(defect_rate)

    poses = [draws.fork(2), draws.fork(3)]
    both = _Both(style, poses)
    second_P = _choose(product.fork(5), surfaces, SURFACE_NAMES)
    image_B3HW, part_BHW = _render_surfaces(both, surface_P.repeat(2), second_P.repeat(2), size)
    image_B3HW, part_BHW = cut_off(both.style(4), both.pose(4), image_B3HW, part_BHW)
    image_B3HW = recolour(both.style(1), image_B3HW)
    image_B3HW = add_dirt(both.style(2), both.pose(2), image_B3HW)
    reference_P3HW, clean_P3HW = image_B3HW.chunk(2)
    query_P3HW, mask_PHW = _draw_defects(
        draws.fork(4), clean_P3HW, part_BHW.chunk(2)[1], defect_P, count_P
    )
    lit_B3HW = light(both.style(3), both.pose(3), torch.cat((reference_P3HW, query_P3HW)))

    reference_P3HW, lit_query_P3HW = lit_B3HW.chunk(2)
    layers = torch.cat((reference_P3HW, lit_query_P3HW, mask_PHW[:, None].float()), dim=1)
    layers = torch.cat((layers, query_P3HW - clean_P3HW), dim=1)
    layers = orient(style.fork(4), layers)
    reference_P3HW, lit_query_P3HW, mask, change_P3HW = layers.split((3, 3, 1, 3), dim=1)
    mask_PHW = mask[:, 0] > 0.5
    return Pairs(
        reference_P3HW=reference_P3HW,
        query_P3HW=lit_query_P3HW,
        mask_PHW=mask_PHW,
        attributes_PA=_describe(
            surface_P, defect_P, count_P, lit_query_P3HW, mask_PHW, change_P3HW.mean(1)
        ),
    )


class _Both:
    """The streams of references and queries, stacked; a style is shared, a pose is not."""

    def __init__(self, style: Draws, poses: list[Draws]) -> None:
        self._style_key_B = style.key_B.repeat(2)
        self._pose_key_B = torch.cat([pose.key_B for pose in poses])

    def style(self, label: int) -> Draws:
        return Draws(self._style_key_B).fork(label)

    def pose(self, label: int) -> Draws:
        return Draws(self._pose_key_B).fork(label)


def _choose(draws: Draws, names: Sequence[str], among: Sequence[str]) -> Tensor:
    index = torch.tensor([among.index(name) for name in names], device=draws.key_B.device)
    return index[draws.integers(len(names))]


def _render_surfaces(
    both: _Both, surface_B: Tensor, second_B: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """One kind a picture, and in some of them a second kind inside a region or as shading."""
    style, pose = both.style(0), both.pose(0)
    image_B3HW, part_BHW = _render_kinds(style, pose, surface_B, size)
    choice, place = both.style(5), both.pose(5)
    index = choice.chance(COMPOUND_RATE).nonzero()[:, 0]
    choice, place = choice.take(index), place.take(index)
    other_B3HW, _ = _render_kinds(choice.fork(0), place.fork(0), second_B[index], size)
    inside_BHW = region(choice.fork(1), place.fork(1), size)
    shading_B1HW = 0.6 + 0.8 * other_B3HW.mean(1, keepdim=True)
    image_B3HW[index] = torch.where(
        choice.fork(2).chance(0.3)[:, None, None, None],
        (image_B3HW[index] * shading_B1HW).clamp(0, 1),
        torch.lerp(image_B3HW[index], other_B3HW, inside_BHW[:, None]),
    )
    return image_B3HW, part_BHW


def _render_kinds(style: Draws, pose: Draws, surface_B: Tensor, size: int) -> tuple[Tensor, Tensor]:
    image_B3HW = torch.empty(len(surface_B), 3, size, size, device=surface_B.device)
    part_BHW = torch.empty(len(surface_B), size, size, dtype=torch.bool, device=surface_B.device)
    for kind in surface_B.unique().tolist():
        index = (surface_B == kind).nonzero()[:, 0]
        render = SURFACES[SURFACE_NAMES[kind]]
        rendering = render(Scene(style.take(index), pose.take(index), size))
        image_B3HW[index], part_BHW[index] = rendering.image_B3HW, rendering.part_BHW
    return image_B3HW, part_BHW


def _draw_defects(
    draws: Draws, image_P3HW: Tensor, part_PHW: Tensor, defect_P: Tensor, count_P: Tensor
) -> tuple[Tensor, Tensor]:
    image_P3HW = image_P3HW.clone()
    mask_PHW = torch.zeros_like(part_PHW)
    for number in range(MAX_DEFECTS):
        stream = draws.fork(number)
        for kind in defect_P[count_P > number].unique().tolist():
            index = ((defect_P == kind) & (count_P > number)).nonzero()[:, 0]
            image, mask = draw_defect(
                DEFECTS[DEFECT_NAMES[kind]],
                stream.take(index),
                image_P3HW[index],
                part_PHW[index],
            )
            image_P3HW[index] = image
            mask_PHW[index] |= mask
    return image_P3HW, mask_PHW


def _describe(
    surface_P: Tensor,
    defect_P: Tensor,
    count_P: Tensor,
    image_P3HW: Tensor,
    mask_PHW: Tensor,
    change_PHW: Tensor,
) -> Tensor:
    """The attribute table (P, A), read off the pictures where they show it."""
    size = mask_PHW.shape[-1]
    area_P = mask_PHW.flatten(1).sum(1)
    is_anomalous = (area_P > 0).long()
    change_P = (change_PHW * mask_PHW).flatten(1).sum(1) / area_P.clamp(min=1)
    polarity_P = torch.where(change_P < -0.03, 1, torch.where(change_P > 0.03, 2, 0))
    extent_P = 1 + (area_P > 0.012 * size**2).long() + (area_P > 0.06 * size**2).long()
    axis = (torch.arange(size, device=mask_PHW.device) + 0.5) * (3 / size)
    row_P = ((mask_PHW.sum(2) * axis).sum(1) / area_P.clamp(min=1)).long()
    column_P = ((mask_PHW.sum(1) * axis).sum(1) / area_P.clamp(min=1)).long()
    columns = {
        Attribute.SURFACE: surface_P,
        Attribute.COLOUR: _colour(image_P3HW),
        Attribute.STATE: is_anomalous,
        Attribute.DEFECT: (1 + defect_P) * is_anomalous,
        Attribute.POLARITY: polarity_P * is_anomalous,
        Attribute.EXTENT: extent_P * is_anomalous,
        Attribute.COUNT: count_P * is_anomalous,
        Attribute.PLACE: (1 + 3 * row_P + column_P) * is_anomalous,
    }
    return torch.stack([columns[attribute] for attribute in Attribute], dim=1)


def _colour(image_P3HW: Tensor) -> Tensor:
    """Index into captions.COLOURS of the mean colour: 3 grays by brightness, then 6 hues."""
    mean_P3 = image_P3HW.mean((2, 3))
    high, low = mean_P3.amax(1), mean_P3.amin(1)
    gray_P = (mean_P3.mean(1) * 3).long().clamp(max=2)
    red, green, blue = mean_P3.unbind(1)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) * (3 / torch.pi)
    return torch.where(high - low < 0.1, gray_P, 3 + torch.remainder(hue.round(), 6).long())
