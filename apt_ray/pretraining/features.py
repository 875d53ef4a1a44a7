"""What pretraining reads from the towers: tokens of several blocks, texts of any tokens.

Shapes: B images, N patch tokens, W vision width, E joint width, K texts, L tokens, C text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock


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
    patches_BNW = visual.conv1((images_B3HW - mean) / std).flatten(2).transpose(1, 2)
    cls_B1W = visual.class_embedding.expand(len(patches_BNW), 1, -1)
    x = visual.ln_pre(torch.cat((cls_B1W, patches_BNW), dim=1) + position_embedding_NW)
    block_tokens_BNW = {}
    for number, block in enumerate(visual.transformer.resblocks):
        x = _apply(block, x)
        if number in blocks:
            block_tokens_BNW[number] = x[:, 1:].float()
    joint = F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)
    return VisionFeatures(
        image_BE=joint[:, 0], tokens_BNE=joint[:, 1:], block_tokens_BNW=block_tokens_BNW
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
    x = embedded_KLC + model.positional_embedding[: embedded_KLC.shape[1]]
    for block in model.transformer.resblocks:
        x = _apply(block, x, is_causal=True)
    ends_KC = model.ln_final(x[torch.arange(len(x), device=x.device), end_K])
    return F.normalize((ends_KC @ model.text_projection).float(), dim=-1)


def _apply(block: ResidualAttentionBlock, x: Tensor, *, is_causal: bool = False) -> Tensor:
    """One of open_clip's residual attention blocks, with fused attention."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in qkv.float().chunk(3, -1)
    )
    # On CPUs the backward pass of fused attention is several times slower in bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    output: Tensor = x + block.mlp(block.ln_2(x))
    return output
