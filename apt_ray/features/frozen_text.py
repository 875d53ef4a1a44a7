"""The text tower of an open_clip CLIP whose weights stay as they are, its gradient written out.

Prompts are trained through it: a step is one pass forward and up to two walks back, on tensors so
small that the bookkeeping of autograd and of fused attention costs as much as the arithmetic.
Nothing is computed that is known or that nobody reads: [SOS] sees itself alone, so that it is the
same in every text, and of the last block only a text's end is read.

K texts, S positions of a text behind its [SOS], C token width, H heads, D width of a head; Q
positions that a block puts out, all S of them or the end alone. Positions come first, so that the
heads of all texts lie side by side: R is S * K, M is Q * K, X is K * H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock
    from torch import nn

Pullback = Callable[[torch.Tensor], torch.Tensor]
"""The gradient at what a function put out -> the gradient at what it was given."""


class FrozenTextTower:
    """What `towers.run_text_tower` puts out, differentiable once, to the embeddings alone.

    Args:
        model: whose weights are frozen; they are not copied.
        start_C: the embedding of [SOS].
    """

    def __init__(self, model: CLIP, start_C: torch.Tensor) -> None:
        self.position_SC = model.positional_embedding[1:]
        self.blocks = [_Block(block) for block in model.transformer.resblocks]
        self.norm = _Norm(model.ln_final)
        x_1C = start_C + model.positional_embedding[:1]
        for block in self.blocks:
            x_1C = block.start_with(x_1C)

    def __call__(self, embedded_KSC: torch.Tensor, end_K: torch.Tensor) -> torch.Tensor:
        """Embeddings of what follows [SOS] -> the normalised output `(K, C)` at position `end_K` of
        it."""
        end_KC: torch.Tensor = _Walk.apply(embedded_KSC, end_K, self)  # type: ignore[no-untyped-call]
        return end_KC


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedded_KSC: torch.Tensor, end_K: torch.Tensor, tower: FrozenTextTower
    ) -> torch.Tensor:
        texts, positions, _ = embedded_KSC.shape
        device, is_trained = embedded_KSC.device, ctx.needs_input_grad[0]
        place_S = torch.arange(positions, device=device)
        before_S = torch.arange(-1, positions, device=device)
        x_SKC = embedded_KSC.transpose(0, 1) + tower.position_SC[:positions, None]
        x_RC, walk = x_SKC.flatten(0, 1), []
        causal_1SS = _additive(before_S <= place_S[:, None], x_RC.dtype)[None]
        *blocks, last = tower.blocks
        for block in blocks:
            x_RC, back = block(x_RC, causal_1SS, texts, is_trained=is_trained)
            walk.append(back)
        row_K = end_K * texts + torch.arange(texts, device=device)
        to_end_KS = _additive(before_S <= end_K[:, None], x_RC.dtype)
        to_end_X1S = to_end_KS.repeat_interleave(last.heads, 0)[:, None]
        x_KC, back = last(x_RC, to_end_X1S, texts, row_K, is_trained=is_trained)
        end_KC, back_of_norm = tower.norm(x_KC)
        ctx.walk, ctx.shape_SKC = [*walk, back, back_of_norm], x_SKC.shape
        return end_KC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_KC: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        for back in reversed(ctx.walk):
            at_KC = back(at_KC)
        return at_KC.view(ctx.shape_SKC).transpose(0, 1), None, None


class _Block:
    """A residual attention block, of all positions or of some rows alone."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        attention, mlp = block.attn, block.mlp
        self.heads = attention.num_heads
        self.norm_1, self.norm_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        self.scale_1, self.scale_2 = block.ls_1, block.ls_2
        self.activation = mlp.gelu
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.query, self.key, self.value = zip(weights, biases, strict=True)
        self.mix = attention.out_proj.weight, attention.out_proj.bias
        self.expand = mlp.c_fc.weight, mlp.c_fc.bias
        self.reduce = mlp.c_proj.weight, mlp.c_proj.bias
        self.first_key_1C = self.first_value_1C = weights[0][:0]

    @torch.no_grad()
    def start_with(self, x_1C: torch.Tensor) -> torch.Tensor:
        """Let every text begin with this input of its first position; what the block makes of
        it."""
        sees_111 = torch.ones(1, 1, 1, dtype=torch.bool, device=x_1C.device)
        output_1C, _ = self(x_1C, _additive(sees_111, x_1C.dtype), 1, is_trained=False)
        normed_1C, _ = self.norm_1(x_1C)
        self.first_key_1C = F.linear(normed_1C, *self.key)
        self.first_value_1C = F.linear(normed_1C, *self.value)
        return output_1C

    def __call__(
        self,
        x_RC: torch.Tensor,
        mask: torch.Tensor,
        texts: int,
        row_M: torch.Tensor | None = None,
        *,
        is_trained: bool,
    ) -> tuple[torch.Tensor, Pullback]:
        """Output `(M, C)` of the rows `row_M`, None being all of them; the additive mask
        broadcasts to `(X, Q, 1 + S)`."""
        normed_RC, back_of_norm_1 = self.norm_1(x_RC)
        x_MC, normed_MC = x_RC, normed_RC
        if row_M is not None:
            x_MC, normed_MC = x_RC.index_select(0, row_M), normed_RC.index_select(0, row_M)
        mixed_MC, back_of_attention = _attend(
            F.linear(normed_MC, *self.query),
            torch.cat([self.first_key_1C.repeat(texts, 1), F.linear(normed_RC, *self.key)]),
            torch.cat([self.first_value_1C.repeat(texts, 1), F.linear(normed_RC, *self.value)]),
            mask,
            (texts, self.heads),
        )
        x_MC = x_MC + self.scale_1(F.linear(mixed_MC, *self.mix))
        normed_MC, back_of_norm_2 = self.norm_2(x_MC)
        hidden, slope = _activate(
            self.activation, F.linear(normed_MC, *self.expand), is_trained=is_trained
        )
        output_MC = x_MC + self.scale_2(F.linear(hidden, *self.reduce))

        def back(at_MC: torch.Tensor) -> torch.Tensor:
            # A layer's scale is its own transpose.
            at_hidden = (self.scale_2(at_MC) @ self.reduce[0]).mul_(slope)
            at_MC = at_MC + back_of_norm_2(at_hidden @ self.expand[0])
            at_query, at_key, at_value = back_of_attention(self.scale_1(at_MC) @ self.mix[0])
            at_normed_RC = at_key[texts:] @ self.key[0]
            at_normed_RC = torch.addmm(at_normed_RC, at_value[texts:], self.value[0])
            if row_M is None:
                at_normed_RC = torch.addmm(at_normed_RC, at_query, self.query[0])
                return back_of_norm_1(at_normed_RC).add_(at_MC)
            at_normed_RC.index_add_(0, row_M, at_query @ self.query[0])
            return back_of_norm_1(at_normed_RC).index_add_(0, row_M, at_MC)

        return output_MC, back


def _attend(
    query_MC: torch.Tensor,
    key_RC: torch.Tensor,
    value_RC: torch.Tensor,
    mask: torch.Tensor,
    texts_and_heads: tuple[int, int],
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
    """What queries read of keys and values; in float32 within, where the tower has less.

    The contexts of prompts are short: storing the matrix of weights costs less than a fused kernel.
    """
    texts, heads = texts_and_heads
    dtype, width = query_MC.dtype, query_MC.shape[1] // heads

    def by_head(x_MC: torch.Tensor) -> torch.Tensor:
        return x_MC.to(mask.dtype).view(-1, texts * heads, width).transpose(0, 1)

    def by_row(x_XQD: torch.Tensor) -> torch.Tensor:
        return x_XQD.transpose(0, 1).reshape(-1, heads * width).to(dtype)

    q_XQD, k_XSD, v_XSD = by_head(query_MC), by_head(key_RC), by_head(value_RC)
    weight_XQS = _softmax(torch.baddbmm(mask, q_XQD, k_XSD.mT, alpha=width**-0.5))

    def back(at_MC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at_XQD = by_head(at_MC)
        at_weight_XQS = torch.bmm(at_XQD, v_XSD.mT).mul_(weight_XQS)
        mean_XQ1 = at_weight_XQS.sum(-1, keepdim=True)
        at_score_XQS = at_weight_XQS.addcmul_(weight_XQS, mean_XQ1, value=-1).mul_(width**-0.5)
        return (
            by_row(torch.bmm(at_score_XQS, k_XSD)),
            by_row(torch.bmm(at_score_XQS.mT, q_XQD)),
            by_row(torch.bmm(weight_XQS.mT, at_XQD)),
        )

    return by_row(torch.bmm(weight_XQS, v_XSD)), back


def _softmax(score_XQS: torch.Tensor) -> torch.Tensor:
    """The softmax over the last axis, in place: of so few scores torch's own takes three times as
    long."""
    score_XQS.sub_(score_XQS.amax(-1, keepdim=True)).exp_()
    return score_XQS.div_(score_XQS.sum(-1, keepdim=True))


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.affine = norm.normalized_shape, norm.weight, norm.bias
        self.eps = norm.eps

    def __call__(self, x_RC: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
        shape, weight, bias = self.affine
        normed_RC, mean, inverse_sd = torch.native_layer_norm(x_RC, shape, weight, bias, self.eps)

        def back(at_RC: torch.Tensor) -> torch.Tensor:
            at_x_RC: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
                at_RC, x_RC, shape, mean, inverse_sd, weight, bias, [True, False, False]
            )[0]
            return at_x_RC

        return normed_RC, back


def _activate(
    activation: nn.Module, x: torch.Tensor, *, is_trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation, and its slope for every walk back."""
    if not is_trained:
        return activation(x), None
    with torch.enable_grad():
        # Not as a module: torch's counter of operations could not follow a walk back within it.
        y = activation.forward(x.requires_grad_())
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), slope


def _additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores of that precision, or of float32 if that is more."""
    mask = sees.new_zeros(sees.shape, dtype=torch.promote_types(dtype, torch.float32))
    return mask.masked_fill_(~sees, -torch.inf)
