"""From support images to a reference memory, and to what is ordinary in front of it.

S support images, B images, N patch tokens, M_l places of reference layer l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apt_ray.anomalies.families import harmless_copies
from apt_ray.config import FitSettings
from apt_ray.detection.reference import ReferenceMemory, encode_turns
from apt_ray.detection.rule import Scale
from apt_ray.features.protocol import ImageEncoder, ImageFeatures

_SMALLEST_SD = 0.04
"""Of distances, as a share of the tokens' mean length: a little less than real images show."""

_WIDENED = 1.5
"""Other images of a product differ from one another by more than views of one image do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Normal images in front of a memory that was made without them.

    Attributes:
        tokens_BNE: their patch tokens.
        distances: reference layer -> their distances `(B, M_l)`.
        scales: reference layer -> what its distances are measured in.
        source: which images they are.
    """

    tokens_BNE: torch.Tensor
    distances: dict[int, torch.Tensor]
    scales: dict[int, Scale]
    source: Literal["left-out support images", "copies of the support image"]


def remember(
    support: ImageFeatures,
    pixels_S3HW: torch.Tensor,
    settings: FitSettings,
    encoder: ImageEncoder,
) -> tuple[ReferenceMemory, HeldOut]:
    """The memory of the support images and of altered copies, and the same leaving one out.

    Args:
        support: features of the support images.
        pixels_S3HW: the support images, preprocessed.
        settings: which copies, and how many places a layer.

    With one support image there is none to leave out: then it is turned by 90, 180 and 270 degrees
    and mirrored, which all joins the memory, and measured against these views of itself alone.
    """
    shots = len(support)
    g = torch.Generator().manual_seed(settings.seed)
    copies = [harmless_copies(pixels_S3HW, 1, g) for _ in range(settings.reference_copies)]
    shown = [
        support,
        *(encoder.encode_in_batches(copy) for copy in copies),
        *encode_turns(pixels_S3HW, settings.reference_rotations, encoder),
    ]

    def memory_of(kept: list[int], shown: list[ImageFeatures]) -> ReferenceMemory:
        images = ImageFeatures.concatenate([features[kept] for features in shown])
        return ReferenceMemory.of(images, settings.reference_size)

    def held_out(
        distances: dict[int, torch.Tensor],
        source: Literal["left-out support images", "copies of the support image"],
        widened: float,
    ) -> HeldOut:
        scales = {
            layer: Scale.of(
                distance, smallest=_SMALLEST_SD * float(support.layers[layer].norm(dim=-1).mean())
            )
            for layer, distance in distances.items()
        }
        return HeldOut(
            tokens_BNE=support.tokens_BNE,
            distances=distances,
            scales={
                layer: scale.model_copy(update={"sd": widened * scale.sd})
                for layer, scale in scales.items()
            },
            source=source,
        )

    if shots == 1:
        views = [encoder.encode_in_batches(view) for view in _turned_and_mirrored(pixels_S3HW)]
        distances = memory_of([0], views).distances(support)
        return memory_of([0], shown + views), held_out(
            distances, "copies of the support image", _WIDENED
        )
    left_out = [
        memory_of([other for other in range(shots) if other != place], shown).distances(
            support[place : place + 1]
        )
        for place in range(shots)
    ]
    distances = {layer: torch.cat([one[layer] for one in left_out]) for layer in left_out[0]}
    return memory_of(list(range(shots)), shown), held_out(distances, "left-out support images", 1.0)


def _turned_and_mirrored(pixels_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """The seven other ways in which a square can lie."""
    mirrored_B3HW = pixels_B3HW.flip(3)
    return [
        *(torch.rot90(pixels_B3HW, quarters, (2, 3)) for quarters in (1, 2, 3)),
        *(torch.rot90(mirrored_B3HW, quarters, (2, 3)) for quarters in range(4)),
    ]
