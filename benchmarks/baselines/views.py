"""Other views of an image that baselines look at: rotations, and windows of patches.

B images, N patch tokens, W windows, K patches in a window, D width of the vision tower, E joint
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from apt_ray.features.attention import run_blocks
from apt_ray.features.clip import FrozenCLIP, resize_position_embedding
from apt_ray.features.pixels import resize_pixels
from apt_ray.features.towers import FusedBlock, embed_patches, project_tokens

ANGLES = tuple(range(0, 360, 45))
SCALES = (2, 3)

_SEQUENCES = 2048


def turned(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Each image in eight rotations of 45 degrees, its edges mirrored outwards, as AnomalyDINO's
    `augment_image` makes them."""
    return [_rotate(image, angle) for image in images for angle in ANGLES]


def _rotate(image: Image.Image, angle: int) -> Image.Image:
    turned_HW3 = ndimage.rotate(np.asarray(image), angle, reshape=False, order=1, mode="mirror")
    return Image.fromarray(turned_HW3)


def windows(grid: tuple[int, int], scale: int) -> Tensor:
    """The patches of every window of `scale` x `scale` patches, `(W, K)`, K = scale squared."""
    rows, columns = grid
    place_HW = torch.arange(rows * columns).reshape(rows, columns)
    return place_HW.unfold(0, scale, 1).unfold(1, scale, 1).reshape(-1, scale * scale)


@torch.no_grad()
def encode_windows(backbone: FrozenCLIP, pixels_B3HW: Tensor, scale: int) -> Tensor:
    """`(B, W, E)` L2-normalised: the CLS token of the tower when it sees one window alone
    (WinCLIP, section 4.2)."""
    visual = backbone.model.visual
    mean, std = (
        torch.tensor(values, device=backbone.device)[:, None, None]
        for values in (visual.image_mean, visual.image_std)
    )
    position_SD = resize_position_embedding(visual.positional_embedding, backbone.grid)
    pixels_B3HW = resize_pixels(pixels_B3HW.to(backbone.device), backbone.prompt_size)
    x_BSD = embed_patches(visual, (pixels_B3HW - mean) / std, position_SD)
    index_WK = windows(backbone.grid, scale).to(backbone.device)
    seen_WS = F.pad(1 + index_WK, (1, 0))
    blocks = [FusedBlock(block) for block in visual.transformer.resblocks]
    parts = []
    for sequences_XSD in x_BSD[:, seen_WS].flatten(0, 1).split(_SEQUENCES):
        tokens_XSD, _ = run_blocks(blocks, sequences_XSD, mask_SS=None, local_blocks=0)
        parts.append(project_tokens(visual, tokens_XSD[:, 0]))
    return F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(x_BSD), len(seen_WS)))
