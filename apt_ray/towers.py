"""The two towers of an open_clip CLIP, forward passes with fused attention.

Inference and pretraining run the same functions, so a backbone is trained as it is read.

B images, N patch tokens, D width of the vision tower, E joint width, C token width, K texts, L
positions of a text; a sequence of image tokens is `[CLS, patches]`, so `S = 1 + N`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from apt_ray.attention import run_blocks

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
        if x_BSD.device.type == "cpu":
            # On CPUs the backward pass of fused attention is several times slower in bfloat16.
            qkv = qkv.float()
        q, k, v = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in qkv.chunk(3, -1)
        )
        with torch.autocast(x_BSD.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal
            )
        x_BSD = x_BSD + block.ls_1(attention.out_proj(mixed.transpose(1, 2).flatten(2)))
        output_BSD: torch.Tensor = x_BSD + block.ls_2(block.mlp(block.ln_2(x_BSD)))
        return output_BSD


def run_vision_tower(
    visual: VisionTransformer,
    pixels_B3HW: torch.Tensor,
    position_SD: torch.Tensor,
    *,
    mask_SS: torch.Tensor | None,
    local_blocks: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Normalised pixels -> all tokens in the joint space `(B, S, E)`, and every block's output
    `(B, S, D)`; the last `local_blocks` blocks use the additive mask (`attention.run_blocks`)."""
    patches_BND = visual.conv1(pixels_B3HW).flatten(2).transpose(1, 2)
    cls_B1D = visual.class_embedding.expand(len(patches_BND), 1, -1)
    x_BSD = visual.ln_pre(torch.cat([cls_B1D, patches_BND], dim=1) + position_SD)
    blocks = [FusedBlock(block) for block in visual.transformer.resblocks]
    x_BSD, outputs = run_blocks(blocks, x_BSD, mask_SS=mask_SS, local_blocks=local_blocks)
    return visual.ln_post(x_BSD) @ visual.proj, outputs


def run_text_tower(model: CLIP, embedded_KLC: torch.Tensor, end_K: torch.Tensor) -> torch.Tensor:
    """Token embeddings -> the normalised output `(K, C)` at position `end_K` of each text.

    The tower is causal, so what stands behind a text's end does not matter.
    """
    x_KLC = embedded_KLC + model.positional_embedding[: embedded_KLC.shape[1]]
    for block in model.transformer.resblocks:
        x_KLC = FusedBlock(block)(x_KLC, is_causal=True)
    end_KC: torch.Tensor = model.ln_final(x_KLC[torch.arange(len(x_KLC)), end_K])
    return end_KC
