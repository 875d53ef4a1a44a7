"""Which kind of self-generated anomaly a place resembles: a name for what prompts and memory found.

An anomaly moves a place's features away from those of a normal one. Each family of anomalies is
drawn on the support images and moves them in a direction of its own; a place of an inspected image
is compared by the direction in which it lies from the nearest place of the support images.

N support images, K drawn anomalies, M_l places of reference layer l, D_l its width, D the sum of
them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.anomalies.families import SELECTION
from apt_ray.detection.nearest import NearestPlace, cells
from apt_ray.features.pixels import resize_pixels, to_pixels
from apt_ray.features.protocol import ImageEncoder, ImageFeatures

Layers = Mapping[int, torch.Tensor]

_DRAWN_SIZE = 512
"""Pixels a side at which anomalies are drawn."""

_VOTERS = 3
"""The most similar anomalies of a family, which speak for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resemblance:
    """How much a place is like a family of anomalies.

    Attributes:
        family: its name in `apt_ray.anomalies.families.SELECTION`.
        similarity: cosine of the directions, mean of the family's most similar anomalies, -1..1.
    """

    family: str
    similarity: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kinds:
    """Drawn anomalies.

    Attributes:
        families: of each, K names.
        directions_KD: float32, of unit length.
    """

    families: tuple[str, ...]
    directions_KD: torch.Tensor

    def of(self, direction_D: torch.Tensor) -> list[Resemblance]:
        """The families by how much a direction resembles theirs, the most similar first."""
        similar_K = self.directions_KD @ direction_D
        found = []
        for family in dict.fromkeys(self.families):
            own = torch.tensor([name == family for name in self.families])
            some = similar_K[own]
            best = some.topk(min(_VOTERS, len(some))).values
            found.append(Resemblance(family=family, similarity=float(best.mean())))
        return sorted(found, key=lambda each: -each.similarity)


def draw_kinds(
    encoder: ImageEncoder, images: Sequence[Image.Image], layers: Layers, *, draws: int, seed: int
) -> Iterator[Kinds]:
    """Anomalies of every family, one support image after another, as the work allows pauses.

    Args:
        layers: reference layer -> `(N, M_l, D_l)` of the images, by this encoder.
        draws: anomalies of a family on each image.
    """
    g = torch.Generator().manual_seed(seed)
    for number, one_3HW in enumerate(to_pixels(images, _DRAWN_SIZE)):
        normal = {layer: tokens[number].float() for layer, tokens in layers.items()}
        yield _drawn_on(encoder, one_3HW.expand(draws, -1, -1, -1), normal, g)


@torch.inference_mode()
def _drawn_on(
    encoder: ImageEncoder, repeated: torch.Tensor, normal: Layers, g: torch.Generator
) -> Kinds:
    families, directions = [], []
    for family, perturb in SELECTION.items():
        drawn = perturb(repeated, g)
        seen = encoder.encode_in_batches(resize_pixels(drawn.pixels_B3HW, encoder.input_size))
        for number, mask_HW in enumerate(drawn.mask_BHW):
            if not mask_HW.any():
                continue  # what was laid over the place is like it
            here = {layer: tokens[number].float().cpu() for layer, tokens in seen.layers.items()}
            point = _most_moved(here, normal)
            families.append(family)
            directions.append(direction(_at(here, point), _at(normal, point)))
    return Kinds(families=tuple(families), directions_KD=torch.stack(directions))


def join(parts: Sequence[Kinds]) -> Kinds:
    """All anomalies of several."""
    return Kinds(
        families=tuple(name for part in parts for name in part.families),
        directions_KD=torch.cat([part.directions_KD for part in parts]),
    )


def departure(
    features: ImageFeatures, point: tuple[float, float], support: Layers, place: NearestPlace
) -> torch.Tensor:
    """`(D,)` the direction in which a point (x, y) of an image lies from a place of the support."""
    here = {layer: tokens[0].float() for layer, tokens in features.layers.items()}
    there = {layer: support[layer][place.image].float() for layer in here}
    return direction(_at(here, point), _at(there, (place.x, place.y)))


def direction(here: Layers, there: Layers) -> torch.Tensor:
    """`(D,)` of unit length, each layer weighing the same."""
    moved = [F.normalize(here[layer] - there[layer], dim=-1) for layer in sorted(here)]
    return F.normalize(torch.cat(moved), dim=-1)


def _at(layers: Layers, point: tuple[float, float]) -> dict[int, torch.Tensor]:
    """`(D_l,)` of each layer at a point (x, y)."""
    here_12 = torch.tensor([[point[1], point[0]]])
    return {layer: tokens[cells(here_12, len(tokens))[0]] for layer, tokens in layers.items()}


def _most_moved(here: Layers, there: Layers) -> tuple[float, float]:
    """The point (x, y) at which features differ most, all layers together."""
    side = max(round(len(tokens) ** 0.5) for tokens in here.values())
    total_SS = torch.zeros(side, side)
    for layer, tokens in here.items():
        moved_M = (tokens - there[layer]).norm(dim=-1)
        own = round(len(moved_M) ** 0.5)
        grid_11HW = (moved_M / moved_M.mean().clamp_min(1e-6)).view(1, 1, own, own)
        total_SS += F.interpolate(grid_11HW, size=(side, side), mode="nearest")[0, 0]
    row, column = divmod(int(total_SS.argmax()), side)
    return (column + 0.5) / side, (row + 0.5) / side
