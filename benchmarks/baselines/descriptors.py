"""What methods without layers of their own compare: one vector for each place of the finest grid.

B images, M_l places and D_l channels of reference layer l, F places of the finest grid, D channels
of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.features.protocol import ImageFeatures

_UNIT = 0.01
"""Tokens whose lengths are 1 within this are directions."""


def descriptors(features: ImageFeatures) -> Tensor:
    """The directions of all reference layers side by side, `(B, F, D)`, L2-normalised.

    A layer that also says how strongly places answer has its directions in another one already, and
    is left out.
    """
    directions = [
        layer_BMD
        for layer_BMD in features.layers.values()
        if ((layer_BMD.norm(dim=-1) - 1).abs() < _UNIT).all()
    ]
    return F.normalize(side_by_side([as_maps(layer_BMD) for layer_BMD in directions]), dim=-1)


def as_maps(tokens_BMD: Tensor) -> Tensor:
    """Tokens of a square grid on their grid, `(B, D, H, W)`."""
    side = isqrt(tokens_BMD.shape[1])
    return tokens_BMD.mT.unflatten(2, (side, side))


def side_by_side(maps_BDHW: Sequence[Tensor]) -> Tensor:
    """Maps of several sizes, enlarged to the finest (bilinear): tokens `(B, F, D)`."""
    finest = max(x_BDHW.shape[-2:] for x_BDHW in maps_BDHW)
    enlarged = [
        F.interpolate(x_BDHW, size=finest, mode="bilinear", align_corners=False)
        for x_BDHW in maps_BDHW
    ]
    return torch.cat(enlarged, 1).flatten(2).mT.contiguous()
