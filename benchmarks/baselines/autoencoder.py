"""A denoising autoencoder of patch features, after Bauer et al. (arXiv 2206.11723).

There a convolutional autoencoder learns to undo distortions of an image's regions, so that it maps
what is anomalous back to what is normal; here the same is learned on the finest grid of
descriptors. A place is as anomalous as its descriptor is far from its restored one.

B images, D channels of a descriptor, H, W the grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.descriptors import as_maps, descriptors
from benchmarks.baselines.support import Encoded, ImageRule, Support

_STEPS, _BATCH, _RATE = 100, 8, 2e-3
_BOTTLENECK = 64
_LARGEST_REGION = 0.5
_CLEAN_WEIGHT = 0.1


def fit(support: Support) -> dict[str, ImageRule]:
    """Train on the support images in eight rotations."""
    network = train(as_maps(descriptors(support.turned)), support.seed)

    @torch.no_grad()
    def restored_distance(encoded: Encoded) -> Tensor:
        tokens_BDHW = as_maps(descriptors(encoded.features))
        cosine_BHW = F.cosine_similarity(network(tokens_BDHW), tokens_BDHW, dim=1)
        return ((1 - cosine_BHW) / 2).flatten(1)

    return {"autoencoder": support.by_patches(restored_distance)}


def train(tokens_BDHW: Tensor, seed: int) -> nn.Module:
    """An autoencoder that restores distorted regions of these token maps."""
    device = tokens_BDHW.device
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(tokens_BDHW.shape[1]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        clean = tokens_BDHW[torch.randint(len(tokens_BDHW), (_BATCH,), generator=g)]
        distorted, mask_B1HW = distort(clean, g)
        cosine_BHW = F.cosine_similarity(network(distorted), clean, dim=1)
        weight_BHW = mask_B1HW[:, 0] + _CLEAN_WEIGHT * (1 - mask_B1HW[:, 0])
        loss = ((1 - cosine_BHW) * weight_BHW).sum() / weight_BHW.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def build(width: int) -> nn.Module:
    """A narrow waist for each patch, and dilated convolutions that look around it."""
    return nn.Sequential(
        nn.Conv2d(width, _BOTTLENECK, 1),
        nn.GELU(),
        nn.Conv2d(_BOTTLENECK, _BOTTLENECK, 3, padding=1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(_BOTTLENECK, _BOTTLENECK, 3, padding=2, dilation=2, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(_BOTTLENECK, width, 1),
    )


def distort(clean_BDHW: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random box of each map overwritten by tokens of other places plus noise; its mask."""
    batch, width, rows, columns = clean_BDHW.shape
    mask_B1HW = torch.zeros(batch, 1, rows, columns)
    for mask_1HW in mask_B1HW:
        height = int(torch.randint(1, max(2, int(_LARGEST_REGION * rows)), (), generator=g))
        breadth = int(torch.randint(1, max(2, int(_LARGEST_REGION * columns)), (), generator=g))
        top = int(torch.randint(rows - height + 1, (), generator=g))
        left = int(torch.randint(columns - breadth + 1, (), generator=g))
        mask_1HW[:, top : top + height, left : left + breadth] = 1
    mask_B1HW = mask_B1HW.to(clean_BDHW.device)
    place = torch.randperm(rows * columns, generator=g)
    other_BDHW = clean_BDHW.roll(1, 0).flatten(2)[..., place].unflatten(2, (rows, columns))
    noise = torch.randn(clean_BDHW.shape, generator=g).to(clean_BDHW.device) / width**0.5
    share = torch.rand(batch, 1, 1, 1, generator=g).to(clean_BDHW.device)
    return torch.lerp(clean_BDHW, torch.lerp(other_BDHW, noise, share), mask_B1HW), mask_B1HW
