"""Feature maps of several layers to one descriptor for each place.

B images, N places of the finest map, D channels of all layers together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def describe(maps_BDHW: Sequence[torch.Tensor], *, pool: int) -> torch.Tensor:
    """Maps of the same images, each of its own width and size -> `(B, N, D)`, float32,
    L2-normalised.

    Each map is averaged over windows of `pool` places a side (an odd number) and brought to unit
    length, and those that are coarser are enlarged to the finest, so that each has the same say in
    a cosine.
    """
    grid = max(x_BDHW.shape[-2:] for x_BDHW in maps_BDHW)
    parts = []
    for x_BDHW in maps_BDHW:
        pooled = F.avg_pool2d(
            x_BDHW.float(), pool, stride=1, padding=pool // 2, count_include_pad=False
        )
        parts.append(
            F.interpolate(
                F.normalize(pooled, dim=1), size=grid, mode="bilinear", align_corners=False
            )
        )
    described_BDHW = torch.cat(parts, 1).contiguous()
    return F.normalize(described_BDHW.flatten(2).mT, dim=-1)
