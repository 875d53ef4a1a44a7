"""WinCLIP (Jeong et al., CVPR 2023), zero-shot and few-shot, as anomalib implements it.

The image score is the rule that all methods here share, not WinCLIP's own.

B images, N patch tokens, W windows, K patches in a window, M references, E joint width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.support import Encoded, ImageRule, Support
from benchmarks.baselines.views import SCALES, windows

TEMPERATURE = 0.07

_TINY = 1e-9  # so that the harmonic mean of distances exists

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ANOMALOUS_STATES = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = (
    "a cropped photo of the {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bright photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a dark photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of the {}.",
    "a blurry photo of a {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of the {} for visual inspection.",
    "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.",
    "a photo of a {} for anomaly detection.",
)


def fit(support: Support) -> dict[str, ImageRule]:
    """Zero-shot from the category's name; few-shot also from its support images."""
    grid = support.backbone.grid
    text_PE = ensemble(support)
    references = {0: support.features.tokens_BNE.flatten(0, 1)} | {
        scale: windows_SWE.flatten(0, 1) for scale, windows_SWE in support.windows.items()
    }

    def zero_shot(encoded: Encoded) -> Tensor:
        whole_B = class_probability(encoded.features.cls_BE, text_PE)
        maps = [whole_B[:, None].expand(-1, grid[0] * grid[1])]
        maps += [
            spread(class_probability(encoded.windows[scale], text_PE), grid, scale)
            for scale in SCALES
        ]
        return harmonic_mean(torch.stack(maps), 0)

    def few_shot(encoded: Encoded) -> Tensor:
        maps = [half_distance(encoded.features.tokens_BNE, references[0])]
        maps += [
            spread(half_distance(encoded.windows[scale], references[scale]), grid, scale)
            for scale in SCALES
        ]
        return torch.stack(maps).mean(0)

    return {
        "winclip-zero": support.by_patches(zero_shot),
        "winclip": support.by_patches(lambda encoded: (zero_shot(encoded) + few_shot(encoded)) / 2),
    }


def ensemble(support: Support) -> Tensor:
    """The compositional prompt ensemble, `(2, E)`: normal, anomalous."""
    name = support.category.replace("_", " ")
    features = [
        support.backbone.encode_texts(
            [template.format(state.format(name)) for state in states for template in TEMPLATES]
        )
        for states in (NORMAL_STATES, ANOMALOUS_STATES)
    ]
    return torch.stack([F.normalize(texts_TE.mean(0), dim=-1) for texts_TE in features])


def class_probability(images_BE: Tensor, text_PE: Tensor) -> Tensor:
    """The anomalous prompt's share, softmax over cosine / 0.07; leading dimensions are kept."""
    return (images_BE @ text_PE.T / TEMPERATURE).softmax(-1)[..., 1]


def half_distance(query_BNE: Tensor, reference_ME: Tensor) -> Tensor:
    """`(B, N)` in 0..1: half of 1 - cosine to the nearest reference."""
    return ((1 - (query_BNE @ reference_ME.T).amax(-1)) / 2).clamp_min(_TINY)


def spread(values_BW: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Each patch's harmonic mean over the windows that hold it, `(B, N)`."""
    index_X = windows(grid, scale).flatten().to(values_BW.device)
    inverse_BX = (1 / values_BW).repeat_interleave(scale * scale, 1)
    nothing_BN = values_BW.new_zeros(len(values_BW), grid[0] * grid[1])
    total_BN = nothing_BN.index_add(1, index_X, inverse_BX)
    return torch.bincount(index_X, minlength=grid[0] * grid[1]) / total_BN


def harmonic_mean(values: Tensor, dim: int) -> Tensor:
    """The harmonic mean along a dimension."""
    return 1 / (1 / values).mean(dim)
