"""Nearest support patch: without rotations, and with them as in AnomalyDINO (Damm et al., 2024).

AnomalyDINO reads DINOv2 and masks the background of some products by hand-made rules; here the
patches are the descriptors of `benchmarks.baselines.descriptors`, and nothing is masked.

B images, F places of the finest grid, K places in memory, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt_ray.features.protocol import ImageFeatures
from benchmarks.baselines.descriptors import descriptors
from benchmarks.baselines.support import ImageRule, PatchRule, Support


def fit_memory(support: Support) -> dict[str, ImageRule]:
    """The patches of the support images as they are."""
    return {"memory": support.by_patches(nearest(support.features))}


def fit_anomalydino(support: Support) -> dict[str, ImageRule]:
    """The patches of the support images in eight rotations."""
    return {"anomalydino": support.by_patches(nearest(support.turned))}


def nearest(shown: ImageFeatures) -> PatchRule:
    """Half the cosine distance to the nearest place of these images: `(B, F)` in 0..1."""
    known_KD = descriptors(shown).flatten(0, 1)

    def distance(seen_FD: Tensor) -> Tensor:
        return ((1 - (seen_FD @ known_KD.T).amax(-1)) / 2).clamp_min(0)

    # One image at a time: products with all places of 32 turned images take gigabytes.
    return lambda encoded: torch.stack([distance(x_FD) for x_FD in descriptors(encoded.features)])
