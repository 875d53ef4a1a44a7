"""How patches attend to one another in inference: in a window, by their values, or as trained.

Locality-aware attention: a patch attends only to patches near it and to the CLS token.

Ordinary attention mixes tokens over the whole image, so that a patch token of the last block no
longer says what lies at its own place. A window keeps it local, without any training. Value-value
attention reaches far, but only what looks alike.

B images, N patch tokens, D width of the vision tower; a sequence is `[CLS, patches]`, so `S = 1 +
N`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Block = Callable[..., torch.Tensor]


class ValueBlock(Protocol):
    """A block that can attend by its values alone."""

    def __call__(self, x_BSD: torch.Tensor) -> torch.Tensor: ...

    def value_value(self, x_BSD: torch.Tensor) -> torch.Tensor: ...


def locality_mask(grid: tuple[int, int], radius: int) -> torch.Tensor:
    """The additive attention mask `(1 + N, 1 + N)`, float32, of 0 and -inf.

    A patch sees the CLS token and the patches at most `radius` rows and columns away; the CLS token
    sees everything. `grid` is (rows, columns).
    """
    rows, columns = grid
    row_N = torch.arange(rows).repeat_interleave(columns)
    column_N = torch.arange(columns).repeat(rows)
    near_NN = ((row_N[:, None] - row_N).abs() <= radius) & (
        (column_N[:, None] - column_N).abs() <= radius
    )
    mask_SS = torch.zeros(1 + len(row_N), 1 + len(row_N))
    mask_SS[1:, 1:].masked_fill_(~near_NN, -torch.inf)
    return mask_SS


def run_blocks(
    blocks: Sequence[Block],
    x_BSD: torch.Tensor,
    *,
    mask_SS: torch.Tensor | None,
    local_blocks: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run residual blocks, the last `local_blocks` of them with locality-aware attention.

    The CLS token runs its own ordinary stream: in every block it attends to patches that were never
    windowed. Returns the tokens `(B, S, D)` of the last block, and the output of every block.
    """
    first_local = len(blocks) - local_blocks
    outputs = []
    for block in blocks[:first_local]:
        x_BSD = block(x_BSD)
        outputs.append(x_BSD)
    ordinary_BSD = local_BSD = x_BSD
    for block in blocks[first_local:]:
        windowed_BSD = block(local_BSD, attn_mask=mask_SS)
        if local_blocks > 1:
            ordinary_BSD = block(ordinary_BSD)
            windowed_BSD = torch.cat([ordinary_BSD[:, :1], windowed_BSD[:, 1:]], dim=1)
        # With one windowed block the CLS token has only met ordinary patches: nothing to replace.
        local_BSD = windowed_BSD
        outputs.append(local_BSD)
    return local_BSD, outputs


def run_value_value(
    blocks: Sequence[ValueBlock], x_BSD: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run residual blocks with a second path for the patches, as in PromptAD and CLIP Surgery.

    The second path begins with the first block's input and adds up what each block's value-value
    attention says of the ordinary tokens, without any feed-forward; so a patch gathers from those
    that look like it. CLS comes from the ordinary path, as do the blocks' outputs `(B, S, D)`.
    """
    path_BSD = x_BSD
    outputs = []
    for block in blocks:
        path_BSD = path_BSD + block.value_value(x_BSD)
        x_BSD = block(x_BSD)
        outputs.append(x_BSD)
    return torch.cat([x_BSD[:, :1], path_BSD[:, 1:]], dim=1), outputs
