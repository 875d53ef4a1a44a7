"""Which kind of defect it is, by confirmed examples of each kind.

Named slots for types of defects beside the anomalous prompt, as in DAPO (arXiv 2512.09446). They
only name what was found: no score and no verdict depends on them.

B images, K kinds, X examples, M_l places of reference layer l, D the widths of all layers together,
S pixels a side of a map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from apt_ray.features.protocol import ImageFeatures

MOST_OF_A_KIND = 32
"""Examples of a kind that are kept."""

_PART_OF_PEAK = 0.7
"""The defect is where the map is at least so much of its highest value."""

_SHRINKAGE = 1.0
"""Of the ridge regression, as a share of what an example differs from the mean of all."""

_SMALLEST = 1e-6  # of one example, which is its own mean, nothing is left to invert

_SAME = 0.9999
"""Cosine of what one image gives twice; float16 and other machines round."""

_SHARPNESS = 5.0
"""By what answers, which lie near 0 and 1, are multiplied before the softmax."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kinds:
    """Kinds of defects.

    Attributes:
        counts: name -> confirmed examples of it, one at the least.
        examples_XD: what they look like, those of one kind after those of another, float16, of unit
            length.
    """

    counts: Mapping[str, int]
    examples_XD: torch.Tensor

    @classmethod
    def of(cls, examples: Sequence[tuple[str, torch.Tensor]]) -> Kinds:
        """The kinds of examples, oldest first: each a name, and `(D,)` of `look`.

        An image that is shown again is of the kind that it was called last. Of a kind with more
        than `MOST_OF_A_KIND` examples the newest count.
        """
        by_name: dict[str, list[torch.Tensor]] = defaultdict(list)
        for place, (name, look_D) in enumerate(examples):
            if not any(is_same(look_D, later_D) for _, later_D in examples[place + 1 :]):
                by_name[name].append(look_D)
        kept = {name: by_name[name][-MOST_OF_A_KIND:] for name in sorted(by_name)}
        return cls(
            counts={name: len(looks) for name, looks in kept.items()},
            examples_XD=torch.stack([look_D for looks in kept.values() for look_D in looks]).half(),
        )

    @property
    def examples(self) -> list[tuple[str, torch.Tensor]]:
        """What `of` made it of, kind by kind."""
        names = [name for name, count in self.counts.items() for _ in range(count)]
        return list(zip(names, self.examples_XD.float(), strict=True))

    def to(self, device: torch.device) -> Kinds:
        """The same on another device."""
        return replace(self, examples_XD=self.examples_XD.to(device))

    def probabilities(self, looks_BD: torch.Tensor) -> list[dict[str, float]]:
        """Name -> probability for each image, by what `look` says of it.

        Ridge regression of the kinds on the examples, each kind weighing the same.
        """
        counts = torch.tensor(list(self.counts.values()), device=looks_BD.device)
        of_X = torch.arange(len(counts), device=looks_BD.device).repeat_interleave(counts)
        weight_X1 = counts[of_X, None] ** -0.5
        examples_XD = self.examples_XD.float()
        mean_D = (weight_X1.square() * examples_XD).sum(0) / len(counts)
        centred_XD = weight_X1 * (examples_XD - mean_D)
        wanted_XK = weight_X1 * (F.one_hot(of_X, len(counts)) - 1 / len(counts))
        alike_XX = centred_XD @ centred_XD.T
        alike_XX.diagonal().add_(_SHRINKAGE * alike_XX.diagonal().mean() + _SMALLEST)
        answers_BK = (looks_BD - mean_D) @ centred_XD.T @ torch.linalg.solve(alike_XX, wanted_XK)
        return [
            dict(zip(self.counts, row, strict=True))
            for row in (_SHARPNESS * answers_BK).softmax(1).tolist()
        ]


def is_same(look_D: torch.Tensor, other_D: torch.Tensor) -> bool:
    """Whether two looks are of one image, encoded twice."""
    return float(look_D @ other_D) > _SAME


def look(features: ImageFeatures, maps_BSS: torch.Tensor) -> torch.Tensor:
    """`(B, D)` what the most anomalous part of each image looks like, of unit length: the mean over
    its places, each layer weighing the same."""
    there_BSS = torch.stack([around_peak(map_SS) for map_SS in maps_BSS])
    parts = []
    for layer in sorted(features.layers):
        tokens_BMD = features.layers[layer]
        side = isqrt(tokens_BMD.shape[1])
        weights_B1M = F.interpolate(there_BSS[:, None], size=(side, side), mode="area").flatten(2)
        parts.append(F.normalize((weights_B1M @ tokens_BMD)[:, 0], dim=-1))
    return F.normalize(torch.cat(parts, dim=-1), dim=-1)


def around_peak(map_SS: torch.Tensor) -> torch.Tensor:
    """1 in the connected part around a map's highest place that is not much lower, else 0; `(S, S)`
    as the map is."""
    high_SS = (map_SS >= _PART_OF_PEAK * map_SS.max()).cpu().numpy()
    labels_SS, _ = ndimage.label(high_SS, structure=np.ones((3, 3)))
    there_SS = labels_SS == labels_SS.flat[int(map_SS.argmax())]
    return torch.from_numpy(there_SS).to(map_SS)
