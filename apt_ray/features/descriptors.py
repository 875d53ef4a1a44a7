"""Feature maps of an encoder's layers to what a reference memory compares.

B images, M_l places and D_l channels of layer l.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def describe(
    maps_BDHW: Sequence[torch.Tensor], *, pool: int, lengths: bool
) -> dict[int, torch.Tensor]:
    """Maps of the same images, each of its own width and size -> reference layers
    `(B, M_l, D_l)`, float32, counted from 0.

    Each map is averaged over windows of `pool` places a side (an odd number) and brought to unit
    length, so that its directions are compared. With `lengths` the last map, which says most of
    what is seen, follows once more as it is: how strongly a place answers tells defects from
    surfaces, and directions alone do not say it.
    """
    pooled = [
        F.avg_pool2d(x_BDHW.float(), pool, stride=1, padding=pool // 2, count_include_pad=False)
        for x_BDHW in maps_BDHW
    ]
    described = [F.normalize(x_BDHW, dim=1) for x_BDHW in pooled] + pooled[-1:] * lengths
    return {
        layer: x_BDHW.flatten(2).transpose(1, 2).contiguous()
        for layer, x_BDHW in enumerate(described)
    }
