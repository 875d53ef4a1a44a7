"""Telling test images: where a detector is surest, where it is most wrong, where it wavers.

I test images, S pixels a side of a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from apt_ray.data.folders import LabelledImage
from apt_ray.levels import FORMER, Reading

Kind = Literal["best", "worst", "borderline"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """A test image and what was said of it.

    Attributes:
        kind: `best`: on the right side of the threshold, and farthest from it. `worst`: on the
            wrong side and farthest, or else nearest to it. `borderline`: nearest to it.
        map_SS: float32 in 0..1, as the detector scores it: not of the image's size.
        reading: how the image's file was read.
    """

    kind: Kind
    image: LabelledImage
    score: float
    map_SS: torch.Tensor
    reading: Reading = FORMER


def choose(
    score_I: NDArray[np.float64],
    is_anomalous_I: NDArray[np.bool_],
    threshold: float,
    count: int,
) -> Iterator[tuple[Kind, int]]:
    """Up to `count` good and `count` defective images that are best, as many that are worst, and
    `2 count` of both that are borderline; none twice."""
    taken: set[int] = set()

    def first(order: NDArray[np.int64], limit: int) -> list[int]:
        picked = [int(i) for i in order if int(i) not in taken][:limit]
        taken.update(picked)
        return picked

    # How far an image lies on its right side of the threshold.
    margin_I = np.where(is_anomalous_I, score_I - threshold, threshold - score_I)
    for kind, direction in (("worst", 1), ("best", -1)):
        order = np.argsort(direction * margin_I, kind="stable")
        for is_anomalous in (True, False):
            members = order[is_anomalous_I[order] == is_anomalous]
            yield from ((kind, i) for i in first(members, count))  # type: ignore[misc]
    order = np.argsort(np.abs(margin_I), kind="stable")
    yield from (("borderline", i) for i in first(order, 2 * count))
