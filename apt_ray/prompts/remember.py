"""From support images to a reference memory, and to what is ordinary in front of it.

S support images, B images, N patch tokens, M_l places of reference layer l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apt_ray.anomalies.families import harmless_copies
from apt_ray.anomalies.spec import JudgeSpec
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """All that a reference memory of S support images is made from.

    Attributes:
        parts: features of the support images, and of what is made of them, S images each.
        views: of a single support image, the seven other ways in which it can lie.
        size: places that a layer of a memory holds at most.
    """

    parts: tuple[ImageFeatures, ...]
    views: tuple[ImageFeatures, ...]
    size: int

    def memory(self, *, without: int | None = None) -> ReferenceMemory:
        """The memory of all support images, or of all but one."""
        shots = len(self.parts[0])
        kept = [place for place in range(shots) if place != without]
        shown = [part[kept] for part in (*self.parts, *self.views)]
        return ReferenceMemory.of(ImageFeatures.concatenate(shown), self.size)

    @property
    def widened(self) -> float:
        """By how much deviations among views fall short of those among images."""
        return _WIDENED if self.views else 1.0

    def smallest(self) -> dict[int, float]:
        """Reference layer -> standard deviation of its distances that is believed at least."""
        layers = self.parts[0].layers
        return {layer: _SMALLEST_SD * float(x.norm(dim=-1).mean()) for layer, x in layers.items()}


def distance_scale(distances: torch.Tensor, *, smallest: float, widened: float) -> Scale:
    """What the distances of a layer are measured in, by those of normal images that the memory was
    made without, of any shape."""
    scale = Scale.of(distances, smallest=smallest)
    return scale.model_copy(update={"sd": widened * scale.sd})


def show(
    support: ImageFeatures,
    pixels_S3HW: torch.Tensor,
    encoder: ImageEncoder,
    settings: FitSettings | JudgeSpec,
) -> Shown:
    """What memories of the support images are made from.

    Args:
        support: features of the support images.
        pixels_S3HW: the support images, preprocessed.
        encoder: of both.
        settings: which copies and turns of each, how many places a layer, and the copies' seed.
    """
    g = torch.Generator().manual_seed(settings.seed)
    altered = [harmless_copies(pixels_S3HW, 1, g) for _ in range(settings.reference_copies)]
    views = _turned_and_mirrored(pixels_S3HW) if len(support) == 1 else []
    return Shown(
        parts=(
            support,
            *(encoder.encode_in_batches(copy) for copy in altered),
            *encode_turns(pixels_S3HW, settings.reference_rotations, encoder),
        ),
        views=tuple(encoder.encode_in_batches(view) for view in views),
        size=settings.reference_size,
    )


def remember(
    support: ImageFeatures,
    pixels_S3HW: torch.Tensor,
    settings: FitSettings,
    encoder: ImageEncoder,
) -> tuple[ReferenceMemory, HeldOut]:
    """The memory of the support images and of altered copies, and the same leaving one out.

    With one support image there is none to leave out: then it is turned by 90, 180 and 270 degrees
    and mirrored, which all joins the memory, and measured against these views of itself alone.

    Args:
        support: features of the support images.
        pixels_S3HW: the support images, preprocessed.
        settings: which copies, and how many places a layer.
    """
    shown = show(support, pixels_S3HW, encoder, settings)
    source: Literal["left-out support images", "copies of the support image"]
    if shown.views:
        source = "copies of the support image"
        views = ImageFeatures.concatenate(shown.views)
        distances = ReferenceMemory.of(views, shown.size).distances(support)
    else:
        source = "left-out support images"
        left_out = [
            shown.memory(without=place).distances(support[place : place + 1])
            for place in range(len(support))
        ]
        distances = {layer: torch.cat([one[layer] for one in left_out]) for layer in left_out[0]}
    smallest = shown.smallest()
    return shown.memory(), HeldOut(
        tokens_BNE=support.tokens_BNE,
        distances=distances,
        scales={
            layer: distance_scale(distance, smallest=smallest[layer], widened=shown.widened)
            for layer, distance in distances.items()
        },
        source=source,
    )


def _turned_and_mirrored(pixels_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """The seven other ways in which a square can lie."""
    mirrored_B3HW = pixels_B3HW.flip(3)
    return [
        *(torch.rot90(pixels_B3HW, quarters, (2, 3)) for quarters in (1, 2, 3)),
        *(torch.rot90(mirrored_B3HW, quarters, (2, 3)) for quarters in range(4)),
    ]
