"""PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265) on the reference layers that all share.

As there: features averaged over 3 x 3 places, enlarged to the finest grid and put side by side; a
greedy coreset of a tenth of the support patches; Euclidean distance to the nearest of them; and for
the image the highest distance, weighted by how lonely that nearest patch is among its 9 neighbours
(equations 6 and 7). Not as there: layers are those of `ImageFeatures`, directions of each stage and
the last stage as it is, not the raw stages of a WideResNet50; those that are not of unit length are
divided by their mean length in the support images, so that all count alike; averaging is over what
the encoder gives, behind its normalisation; the coreset is drawn without a random projection,
beginning at the mean. Distances are divided by a constant, which changes no order.

B images, F places of the finest grid, K places in memory, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.detection.reference import coreset
from apt_ray.features.protocol import ImageFeatures
from benchmarks.baselines.descriptors import as_maps, side_by_side
from benchmarks.baselines.support import Encoded, ImageRule, Support

_SHARE, _NEIGHBOURS = 0.1, 9
_FAR = 16.0  # a distance that none reaches


def fit(support: Support) -> dict[str, ImageRule]:
    """A coreset of the support images' patches."""
    lengths = {layer: x.norm(dim=-1).mean() for layer, x in support.features.layers.items()}
    patches_XD = embed(support.features, lengths).flatten(0, 1)
    known_KD = patches_XD[coreset(patches_XD, round(_SHARE * len(patches_XD)))]

    def score(encoded: Encoded) -> tuple[Tensor, Tensor]:
        found = [distances(x_FD, known_KD) for x_FD in embed(encoded.features, lengths)]
        distances_BF = torch.stack([of_patches_F for of_patches_F, _ in found])
        maps_BSS, _ = support.rule.score_patches((distances_BF / _FAR).clamp_max(1))
        return maps_BSS, (torch.stack([of_image for _, of_image in found]) / _FAR).clamp_max(1)

    return {"patchcore": ImageRule(score=score)}


def embed(features: ImageFeatures, lengths: dict[int, Tensor]) -> Tensor:
    """Patches `(B, F, D)`: all layers, divided by `lengths`, locally averaged, side by side."""
    maps = [as_maps(tokens_BMD / lengths[layer]) for layer, tokens_BMD in features.layers.items()]
    return side_by_side([F.avg_pool2d(x_BDHW, 3, stride=1, padding=1) for x_BDHW in maps])


def distances(patches_FD: Tensor, known_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Of one image's patches `(F,)` to the nearest known one, and of the image `()`."""
    nearest_F, which_F = torch.cdist(patches_FD, known_KD).min(1)
    worst = nearest_F.argmax()
    own_D = known_KD[which_F[worst]]
    # The known patch itself is the first of its neighbours.
    around_B = torch.cdist(own_D[None], known_KD)[0].topk(_NEIGHBOURS, largest=False).indices
    weight = 1 - torch.cdist(patches_FD[worst][None], known_KD[around_B])[0].softmax(0)[0]
    return nearest_F, weight * nearest_F[worst]
