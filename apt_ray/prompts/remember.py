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

_HELD_OUT_COPIES = 8
_COPY_WIDENED = 1.5
"""Other images of a product differ from one another by more than copies of one image do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Normal images in front of a memory that was made without them.

    Attributes:
        tokens_BNE: their patch tokens.
        distances: reference layer -> their distances `(B, M_l)`.
        source: which images they are.
    """

    tokens_BNE: torch.Tensor
    distances: dict[int, torch.Tensor]
    source: Literal["left-out support images", "copies of the support image"]

    def scales(self) -> dict[int, Scale]:
        """What distances are measured in, a scale for each reference layer."""
        widened = _COPY_WIDENED if self.source == "copies of the support image" else 1.0
        return {
            layer: Scale.of(distance, widened=widened) for layer, distance in self.distances.items()
        }


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

    With one support image there is none to leave out: then further copies of it are held out, and
    the memory also holds it turned by 90, 180 and 270 degrees and mirrored.
    """
    shots = len(support)
    alone = shots == 1
    g = torch.Generator().manual_seed(settings.seed)
    held_out_copies = _HELD_OUT_COPIES if alone else 0
    copies = settings.reference_copies + held_out_copies
    altered = [harmless_copies(pixels_S3HW, 1, g) for _ in range(copies)]
    shown = [
        support,
        *(encoder.encode_in_batches(copy) for copy in altered[held_out_copies:]),
        *encode_turns(pixels_S3HW, settings.reference_rotations, encoder),
    ]
    if alone:
        mirrored = pixels_S3HW.flip(3)
        shown += [
            encoder.encode_in_batches(torch.rot90(image, quarters, (2, 3)))
            for image in (pixels_S3HW, mirrored)
            for quarters in range(image is pixels_S3HW, 4)
        ]

    def memory_of(kept: list[int]) -> ReferenceMemory:
        images = ImageFeatures.concatenate([features[kept] for features in shown])
        return ReferenceMemory.of(images, settings.reference_size)

    places = list(range(shots))
    memory = memory_of(places)
    if alone:
        copied = encoder.encode_in_batches(torch.cat(altered[:held_out_copies]))
        return memory, HeldOut(
            tokens_BNE=copied.tokens_BNE,
            distances=memory.distances(copied),
            source="copies of the support image",
        )
    left_out = [
        memory_of([other for other in places if other != place]).distances(
            support[place : place + 1]
        )
        for place in places
    ]
    return memory, HeldOut(
        tokens_BNE=support.tokens_BNE,
        distances={layer: torch.cat([one[layer] for one in left_out]) for layer in left_out[0]},
        source="left-out support images",
    )
