"""What an encoder of images says, whichever it is.

B images, N patch tokens, E joint width, D width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFeatures:
    """What the frozen vision tower says of B images, float32 on the backbone's device.

    Attributes:
        tokens_BNE: patch tokens in the joint space, L2-normalised, row by row from the top left.
        cls_BE: the whole image in the joint space, L2-normalised.
        layers: reference layer -> `(B, N, D)` patch tokens of that block, L2-normalised.
    """

    tokens_BNE: torch.Tensor
    cls_BE: torch.Tensor
    layers: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens_BNE)

    def __getitem__(self, index: slice | list[int]) -> ImageFeatures:
        return ImageFeatures(
            tokens_BNE=self.tokens_BNE[index],
            cls_BE=self.cls_BE[index],
            layers={layer: tokens[index] for layer, tokens in self.layers.items()},
        )

    def to(self, device: torch.device) -> ImageFeatures:
        """The same features on another device."""
        return ImageFeatures(
            tokens_BNE=self.tokens_BNE.to(device),
            cls_BE=self.cls_BE.to(device),
            layers={layer: tokens.to(device) for layer, tokens in self.layers.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of all parts, in order."""
        return ImageFeatures(
            tokens_BNE=torch.cat([part.tokens_BNE for part in parts]),
            cls_BE=torch.cat([part.cls_BE for part in parts]),
            layers={
                layer: torch.cat([part.layers[layer] for part in parts])
                for layer in parts[0].layers
            },
        )
