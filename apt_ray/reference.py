"""The reference memory: how far a patch is from everything that the support images show.

B images, N patch tokens, M patches in memory, D width of the vision tower.
"""

from collections.abc import Mapping

import torch

from apt_ray.backbone import ImageFeatures


class ReferenceMemory:
    """Patch tokens of the support images, a bank for each reference layer.

    Attributes:
        layers: layer -> `(M, D)` L2-normalised tokens, float16.
    """

    def __init__(self, layers: Mapping[int, torch.Tensor]) -> None:
        self.layers = {layer: tokens_MD.half() for layer, tokens_MD in layers.items()}

    @classmethod
    def of(cls, support: ImageFeatures) -> "ReferenceMemory":
        """The memory of all patches of the support images."""
        return cls({layer: tokens.flatten(0, 1) for layer, tokens in support.layers.items()})

    def to(self, device: torch.device) -> "ReferenceMemory":
        """The same memory on another device."""
        return ReferenceMemory({layer: tokens.to(device) for layer, tokens in self.layers.items()})

    def distance(self, features: ImageFeatures) -> torch.Tensor:
        """Cosine distance to the nearest patch, `(B, N)` in 0..2, mean over the layers."""
        # Multiplied in float32, which is what CPUs are fast at; kept in float16, because a replica
        # holds the memories of a thousand categories.
        return torch.stack(
            [
                1 - (tokens_BND @ self.layers[layer].float().T).amax(-1)
                for layer, tokens_BND in features.layers.items()
            ]
        ).mean(0)
