"""What a place should have looked like: the place of the support images that is nearest to it.

M_l places of reference layer l, F of the finest layer, N support images, K their finest places, D
width of a layer, P places that are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from apt_ray.detection.reference import are_directions
from apt_ray.detection.rule import Scales
from apt_ray.features.protocol import ImageFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestPlace:
    """A place of a support image.

    Attributes:
        image: which of the support images, from 0.
        x, y: its middle, as shares (0..1) of the image's width and height.
        distance: from the place that was asked for, in standard deviations of what good parts are
            from one another, the mean of all layers: about 0 for a good one.
    """

    image: int
    x: float
    y: float
    distance: float


def nearest_places(
    features: ImageFeatures,
    support: Mapping[int, torch.Tensor],
    scales: Scales,
    points: Sequence[tuple[float, float]],
) -> list[NearestPlace]:
    """For each point (x, y) of an image, in shares of it, the nearest place of the support images.

    Args:
        features: of the one image.
        support: reference layer -> `(N, M_l, D)` of the support images, by the same encoder.
        scales: what the distances of each layer are measured in.
    """
    if not points:
        return []
    side = max(isqrt(tokens.shape[1]) for tokens in support.values())
    images = len(next(iter(support.values())))
    finest_F2 = torch.cartesian_prod(torch.arange(side), torch.arange(side)).add(0.5).div(side)
    asked_P2 = torch.tensor([(y, x) for x, y in points])
    total_PK = torch.zeros(len(points), images * side * side)
    for layer, tokens_NMD in support.items():
        here_PD = features.layers[layer][0][cells(asked_P2, tokens_NMD.shape[1])].float()
        known_XD = tokens_NMD.flatten(0, 1).float()
        if are_directions(known_XD):
            distances_PX = 1 - here_PD @ known_XD.T
        else:
            distances_PX = torch.cdist(here_PD, known_XD)
        # Every finest place has the distance of this layer's place around it.
        of_finest_F = cells(finest_F2, tokens_NMD.shape[1])
        distances_PK = distances_PX.unflatten(1, (images, -1))[:, :, of_finest_F].flatten(1)
        scale = scales.layers[layer]
        total_PK += (distances_PK - scale.mean) / scale.sd
    nearest_P = total_PK.div(len(support)).min(dim=1)
    return [
        NearestPlace(
            image=index // side**2,
            x=(index % side + 0.5) / side,
            y=(index % side**2 // side + 0.5) / side,
            distance=distance,
        )
        for distance, index in zip(
            nearest_P.values.tolist(), nearest_P.indices.tolist(), strict=True
        )
    ]


def cells(points_X2: torch.Tensor, places: int) -> torch.Tensor:
    """The places (row by row, of a square grid) that points (y, x) lie in."""
    side = isqrt(places)
    rows_X, columns_X = (points_X2 * side).long().clamp(0, side - 1).unbind(1)
    return rows_X * side + columns_X
