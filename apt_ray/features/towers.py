"""The two towers of an open_clip CLIP, forward passes with fused attention.

Inference and pretraining run the same functions, so a backbone is trained as it is read.

B images, N patch tokens, D width of the vision tower, E joint width, C token width, K texts, L
positions of a text; a sequence of image tokens is `[CLS, patches]`, so `S = 1 + N`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from apt_ray.features.attention import run_blocks, run_value_value

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer


class FusedBlock:
    """One of open_clip's residual attention blocks, its attention computed by torch's fused kernel.

    The result is the block's own up to rounding; the (S, S) matrix of weights is never stored.
    """

    def __init__(self, block: ResidualAttentionBlock) -> None:
        self._block = block

    def __call__(
        self,
        x_BSD: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The block's output for `x_BSD`; the mask (S, S) is additive."""
        block, attention = self._block, self._block.attn
        qkv = F.linear(block.ln_1(x_BSD), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (self._heads(part) for part in qkv.chunk(3, -1))
        x_BSD = x_BSD + self._attend(q, k, v, attn_mask, is_causal=is_causal)
        output_BSD: torch.Tensor = x_BSD + block.ls_2(block.mlp(block.ln_2(x_BSD)))
        return output_BSD

    def value_value(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """What the block's attention would add if its values were its queries and keys too."""
        block, attention = self._block, self._block.attn
        width = x_BSD.shape[-1]
        v = self._heads(
            F.linear(
                block.ln_1(x_BSD),
                attention.in_proj_weight[-width:],
                attention.in_proj_bias[-width:],
            )
        )
        return self._attend(v, v, v, None)

    def _heads(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if x_BSD.device.type == "cpu":
            # On CPUs the backward pass of fused attention is several times slower in bfloat16.
            x_BSD = x_BSD.float()
        heads_BHSK: torch.Tensor = x_BSD.unflatten(-1, (self._block.attn.num_heads, -1))
        return heads_BHSK.transpose(1, 2)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        *,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal
            )
        block, project = self._block, self._block.attn.out_proj
        mixed_BSD = mixed.transpose(1, 2).flatten(2).to(project.weight.dtype)
        added_BSD: torch.Tensor = block.ls_1(project(mixed_BSD))
        return added_BSD


def run_vision_tower(
    visual: VisionTransformer,
    pixels_B3HW: torch.Tensor,
    position_SD: torch.Tensor,
    *,
    mask_SS: torch.Tensor | None = None,
    local_blocks: int = 0,
    value_value: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Normalised pixels -> all tokens in the joint space `(B, S, E)`, and every block's output
    `(B, S, D)`; the last `local_blocks` blocks use the additive mask (`attention.run_blocks`), or
    the patches take the value-value path (`attention.run_value_value`)."""
    x_BSD = embed_patches(visual, pixels_B3HW, position_SD)
    blocks = [FusedBlock(block) for block in visual.transformer.resblocks]
    if value_value:
        x_BSD, outputs = run_value_value(blocks, x_BSD)
    else:
        x_BSD, outputs = run_blocks(blocks, x_BSD, mask_SS=mask_SS, local_blocks=local_blocks)
    return project_tokens(visual, x_BSD), outputs


def embed_patches(
    visual: VisionTransformer, pixels_B3HW: torch.Tensor, position_SD: torch.Tensor
) -> torch.Tensor:
    """Normalised pixels -> the tokens `(B, S, D)` that enter the first block."""
    pixels_B3HW = pixels_B3HW.to(visual.conv1.weight.dtype)
    patches_BND = visual.conv1(pixels_B3HW).flatten(2).transpose(1, 2)
    cls_B1D = visual.class_embedding.expand(patches_BND.shape[0], 1, -1)
    x_BSD: torch.Tensor = visual.ln_pre(torch.cat([cls_B1D, patches_BND], dim=1) + position_SD)
    return x_BSD


def project_tokens(visual: VisionTransformer, x_BSD: torch.Tensor) -> torch.Tensor:
    """The last block's tokens in the joint space, `(B, S, E)`."""
    joint_BSE: torch.Tensor = visual.ln_post(x_BSD) @ visual.proj
    return joint_BSE


def run_text_tower(model: CLIP, embedded_KLC: torch.Tensor, end_K: torch.Tensor) -> torch.Tensor:
    """Token embeddings -> the normalised output `(K, C)` at position `end_K` of each text.

    The tower is causal, so what stands behind a text's end does not matter.
    """
    x_KLC = embedded_KLC + model.positional_embedding[: embedded_KLC.shape[1]]
    for block in model.transformer.resblocks:
        x_KLC = FusedBlock(block)(x_KLC, is_causal=True)
    end_KC: torch.Tensor = model.ln_final(
        x_KLC[torch.arange(len(x_KLC), device=x_KLC.device), end_K]
    )
    return end_KC
