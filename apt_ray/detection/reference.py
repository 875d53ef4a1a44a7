"""The reference memory: how far a patch is from everything that the support images show.

B images, N patch tokens, M patches in memory, D width of the vision tower.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from apt_ray.config import Settings
from apt_ray.features.protocol import ImageEncoder, ImageFeatures

_SMALLEST_SD = 1e-4


class DistanceScale(Settings):
    """What distances are measured in: those of normal places to other images than their own."""

    mean: float = Field(description="Mean distance.")
    sd: float = Field(gt=0, description="Its standard deviation over places and images.")

    @classmethod
    def of(cls, distances: torch.Tensor) -> "DistanceScale":
        """The scale of distances of normal places, of any shape."""
        return cls(mean=float(distances.mean()), sd=max(float(distances.std()), _SMALLEST_SD))


class ReferenceMemory:
    """Features of the support images, a bank for each reference layer.

    Attributes:
        layers: layer -> `(M, D)` L2-normalised features, float16.
        scale: how its distances become probabilities; None leaves that to the backbone's constants.
    """

    def __init__(
        self, layers: Mapping[int, torch.Tensor], scale: DistanceScale | None = None
    ) -> None:
        self.layers = {layer: tokens_MD.half() for layer, tokens_MD in layers.items()}
        self.scale = scale

    @classmethod
    def of(cls, support: ImageFeatures, size: int | None = None) -> "ReferenceMemory":
        """The memory of the support images' patches: of all, or of a coreset of `size` a layer."""
        layers = {layer: tokens.flatten(0, 1) for layer, tokens in support.layers.items()}
        if size is not None:
            layers = {layer: tokens[coreset(tokens, size)] for layer, tokens in layers.items()}
        return cls(layers)

    def to(self, device: torch.device) -> "ReferenceMemory":
        """The same memory on another device."""
        layers = {layer: tokens.to(device) for layer, tokens in self.layers.items()}
        return ReferenceMemory(layers, self.scale)

    def scaled(self, scale: DistanceScale | None) -> "ReferenceMemory":
        """The same memory, whose distances become probabilities so."""
        return ReferenceMemory(self.layers, scale)

    def distance(self, features: ImageFeatures) -> torch.Tensor:
        """Cosine distance to the nearest place, `(B, M)` in 0..2, mean over the layers."""
        # Multiplied in float32, which is what CPUs are fast at; kept in float16, because a replica
        # holds the memories of a thousand categories.
        return torch.stack(
            [
                1 - (tokens_BND @ self.layers[layer].float().T).amax(-1)
                for layer, tokens_BND in features.layers.items()
            ]
        ).mean(0)


def coreset(tokens_MD: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of at most `size` tokens such that every token has a near one among them.

    Greedy k-centre, as in PatchCore (arXiv 2106.08265): always the token next that is farthest
    from all chosen ones. Tokens are of unit length; the first is the one nearest to their mean.
    """
    if size >= len(tokens_MD):
        return torch.arange(len(tokens_MD))
    # Hundreds of small operations in a row, for which numpy has half of torch's overhead.
    known_MD = tokens_MD.cpu().numpy()
    chosen = [int((known_MD @ known_MD.mean(0)).argmax())]
    nearest_M = known_MD @ known_MD[chosen[0]]
    while len(chosen) < size:
        chosen.append(int(nearest_M.argmin()))
        np.maximum(nearest_M, known_MD @ known_MD[chosen[-1]], out=nearest_M)
    return torch.tensor(chosen)


def encode_turns(
    pixels_S3HW: torch.Tensor, turns: int, backbone: ImageEncoder
) -> list[ImageFeatures]:
    """The features of the images turned by 1 to `turns - 1` times 360 / `turns` degrees.

    Corners that a turn leaves empty show the image mirrored at its edge.
    """
    encoded = []
    for turn in range(1, turns):
        angle = torch.tensor(2 * torch.pi * turn / turns)
        cos, sin = angle.cos(), angle.sin()
        rotation_23 = torch.stack(
            [torch.stack([cos, -sin, sin * 0]), torch.stack([sin, cos, sin * 0])]
        )
        grid = F.affine_grid(
            rotation_23.expand(len(pixels_S3HW), 2, 3), list(pixels_S3HW.shape), align_corners=False
        )
        turned = F.grid_sample(pixels_S3HW, grid, padding_mode="reflection", align_corners=False)
        encoded.append(backbone.encode_in_batches(turned))
    return encoded
