"""What pretraining reads from the towers: tokens of several blocks, texts of any tokens.

Shapes: B images, N patch tokens, W vision width, E joint width, K texts, L tokens, C text width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.config import BACKBONE, BackboneSpec
from apt_ray.features.attention import locality_mask
from apt_ray.features.towers import run_text_tower, run_vision_tower

if TYPE_CHECKING:
    from open_clip import CLIP

REFERENCE_BLOCKS = (2, 3, 4)
"""Blocks whose patch tokens are trained to tell a defect by its distance to a good picture."""

# The tower is trained with the windows that inference gives it by default.
_SPEC = BackboneSpec(reference_encoder=BACKBONE)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionFeatures:
    """L2-normalised features in the joint space, and the raw outputs of chosen blocks."""

    image_BE: Tensor
    tokens_BNE: Tensor
    block_tokens_BNW: dict[int, Tensor]


def encode_images(
    model: CLIP, images_B3HW: Tensor, position_embedding_NW: Tensor, blocks: Sequence[int] = ()
) -> VisionFeatures:
    """Encode images in 0..1 with given position embeddings (that of CLS first)."""
    visual = model.visual
    mean, std = (
        torch.tensor(values, device=images_B3HW.device)[:, None, None]
        for values in (visual.image_mean, visual.image_std)
    )
    joint_BSE, outputs = run_vision_tower(
        visual,
        (images_B3HW - mean) / std,
        position_embedding_NW,
        mask_SS=_locality_mask(len(position_embedding_NW) - 1).to(images_B3HW.device),
        local_blocks=_SPEC.locality_blocks,
    )
    joint_BSE = F.normalize(joint_BSE.float(), dim=-1)
    return VisionFeatures(
        image_BE=joint_BSE[:, 0],
        tokens_BNE=joint_BSE[:, 1:],
        block_tokens_BNW={number: outputs[number][:, 1:].float() for number in blocks},
    )


def position_embedding(
    model: CLIP, cells: int, *, row: int = 0, column: int = 0, span: int | None = None
) -> Tensor:
    """(1 + cells**2, W): the embeddings of a window of the grid, `span` cells wide, resized to
    `cells` cells; without `span` the whole grid."""
    table = model.visual.positional_embedding
    side = model.visual.grid_size[0]
    span = span or side
    grid = table[1:].T.reshape(1, -1, side, side)[..., row : row + span, column : column + span]
    if span != cells:
        grid = F.interpolate(
            grid, (cells, cells), mode="bicubic", antialias=True, align_corners=False
        )
    return torch.cat((table[:1], grid.flatten(2)[0].T))


def encode_texts(model: CLIP, embedded_KLC: Tensor, end_K: Tensor) -> Tensor:
    """(K, E) L2-normalised features of embedded token sequences that end at `end_K`."""
    ends_KC = run_text_tower(model, embedded_KLC, end_K)
    return F.normalize((ends_KC @ model.text_projection).float(), dim=-1)


@functools.cache
def _locality_mask(patches: int) -> Tensor:
    side = round(patches**0.5)
    return locality_mask((side, side), _SPEC.locality_radius)
