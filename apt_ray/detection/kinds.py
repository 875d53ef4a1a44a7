"""Which kind of defect it is, by the names of kinds and by confirmed examples of them.

Slots of defect types beside the anomalous prompt, as in DAPO (arXiv 2512.09446); here they only
name what was found, and no verdict depends on them.

B images, K kinds, X examples, E joint width, M_l places of reference layer l, D the widths of all
layers together, S pixels a side of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from apt_ray.features.protocol import ImageFeatures, TextEncoder

_PART_OF_PEAK = 0.5
"""The defect is where the map is at least so much of its highest value."""

_VOTERS = 3
"""The most similar examples of a kind, which speak for it."""

_TEMPERATURE = 0.05
"""Of the softmax over the kinds, in cosines."""

_SENTENCES = ("{}", "a {}", "a {} on a surface", "a part with a {}", "a photo of a {}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kinds:
    """Kinds of defects.

    Attributes:
        counts: name -> examples of it.
        texts_KE: the names, as the text encoder has them, float32 of unit length.
        examples_XD: what examples look like, those of one kind after those of another, float16 of
            unit length.
    """

    counts: Mapping[str, int]
    texts_KE: torch.Tensor
    examples_XD: torch.Tensor

    def to(self, device: torch.device) -> Kinds:
        """The same on another device."""
        return replace(
            self, texts_KE=self.texts_KE.to(device), examples_XD=self.examples_XD.to(device)
        )

    def probabilities(
        self, features: ImageFeatures, maps_BSS: torch.Tensor
    ) -> list[dict[str, float]]:
        """Name -> probability, of what is most anomalous in each image."""
        looks_BD = look(features, maps_BSS)
        parts = self.examples_XD.float().split(list(self.counts.values()))
        similar_BK = torch.stack(
            [
                (looks_BD @ part_xD.T).topk(min(_VOTERS, len(part_xD))).values.mean(1)
                for part_xD in parts
            ],
            dim=1,
        )
        return [
            dict(zip(self.counts, row, strict=True))
            for row in (similar_BK / _TEMPERATURE).softmax(1).tolist()
        ]
