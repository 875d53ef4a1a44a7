"""Whether a frame shows one whole part, as the good pictures do.

A detector that has learned from pictures of whole parts finds a part odd that the frame's edge
cuts. So on a belt only those frames are inspected that show what the pictures show: a part of their
size, clear of the edge. A light barrier would give the same signal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from apt_ray.config import Settings
from apt_ray.video.changes import SIDE, SmallFrame, small_frame

_EDGE = 2  # blocks along each side of a frame that say what the ground is
# What makes a part on a ground, as `anomalies/object_mask.py` has it, and clear of the edge.
_MIN_SEPARATION = 0.75
_MIN_AREA = 0.03
_MAX_ON_EDGE = 0.05
_TOLERANCE = 0.2  # of the area, beyond those of the good pictures
_SPECKS = 0.005  # of the edge: dirt on the belt
# Of the distance from the ground's colour that the edges of good pictures have: the rim of the next
# part comes before its face does.
_RIM_QUANTILE, _RIM = 0.999, 1.5


class PartView(Settings):
    """What one whole part looks like from afar: how much of a frame, and of its edge, is unlike the
    ground."""

    ground: tuple[float, float, float] = Field(description="Colour of the ground, 0..255.")
    unlike: float = Field(gt=0, description="Distance in colour from which it is the part.")
    rim: float = Field(gt=0, description="Distance from which something lies on the edge.")
    least_area: float = Field(ge=0, le=1, description="Share of a frame that a whole part covers.")
    most_area: float = Field(ge=0, description="Above it, there are several.")
    most_on_edge: float = Field(ge=0, le=1, description="Share of a frame's edge that it touches.")

    @classmethod
    def of(cls, pictures: Sequence[Image.Image]) -> PartView | None:
        """The view in good pictures, RGB; None where they show no part on a ground, but a surface,
        a part that is cut, or nothing at all."""
        from apt_ray.anomalies.object_mask import otsu  # with torch: where parts are learned alone

        frames = [small_frame(picture) for picture in pictures]
        if not frames:
            return None
        edge_X3 = np.concatenate([frame[_EDGES] for frame in frames])
        ground_3 = np.median(edge_X3, axis=0)
        unlike = np.stack([_distance(frame, ground_3) for frame in frames])
        cut, separation = otsu(unlike.ravel().astype(np.float64))
        masks = unlike > cut
        if separation < _MIN_SEPARATION or masks[:, _EDGES].mean(1).max() > _MAX_ON_EDGE:
            return None
        areas = masks.mean((1, 2))
        if areas.min() < _MIN_AREA:
            return None
        edges = unlike[:, _EDGES]
        rim = min(cut, _RIM * float(np.quantile(edges[edges <= cut], _RIM_QUANTILE)) + 1)
        red, green, blue = ground_3.tolist()
        return cls(
            ground=(red, green, blue),
            unlike=cut,
            rim=rim,
            least_area=float(areas.min()) * (1 - _TOLERANCE),
            most_area=float(areas.max()) * (1 + _TOLERANCE),
            most_on_edge=float((edges > rim).mean(1).max()) + _SPECKS,
        )

    def is_in(self, frame: SmallFrame) -> bool:
        """Whether a frame shows one whole part."""
        unlike = _distance(frame, np.array(self.ground))
        is_clear = (unlike[_EDGES] > self.rim).mean() <= self.most_on_edge
        return bool(is_clear and self.least_area <= (unlike > self.unlike).mean() <= self.most_area)


def _distance(frame: SmallFrame, ground_3: NDArray[np.floating]) -> NDArray[np.floating]:
    distance: NDArray[np.floating] = np.sqrt(np.square(frame - ground_3).sum(-1))
    return distance


_EDGES = np.ones((SIDE, SIDE), np.bool_)
_EDGES[_EDGE:-_EDGE, _EDGE:-_EDGE] = False
