"""Pseudo-anomalies in time: what goes wrong with streams, made of good ones.

They judge how a stream is watched, as perturbed images judge how a part is inspected: jumps and
repetitions of frames, and frames that are bent, after the spatio-temporal pseudo-anomalies of Rai
et al. (arXiv 2311.16514). Nothing learns from them.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

Frames = Sequence[Image.Image]

_BUMPS = 4  # across a frame, of what bends it


def jump(frames: Frames, at: int, length: int) -> list[Image.Image]:
    """The frames without `length` of them from `at` on: they were lost."""
    return [*frames[:at], *frames[at + length :]]


def repeat(frames: Frames, at: int, length: int) -> list[Image.Image]:
    """The frames with `length` of them behind `at` replaced by it: the camera froze."""
    return [*frames[: at + 1], *[frames[at]] * length, *frames[at + 1 + length :]]


def warp(
    frames: Frames, at: int, length: int, *, strength: float = 0.04, seed: int = 0
) -> list[Image.Image]:
    """The frames with `length` of them from `at` on bent, all alike.

    `strength` is the standard deviation of the way that a pixel goes, a share of the frame's side.
    """
    rng = np.random.default_rng(seed)
    width, height = frames[at].size
    cells = rng.standard_normal((2, _BUMPS, _BUMPS), dtype=np.float32)
    shift_2HW = np.stack(
        [
            np.asarray(Image.fromarray(cell).resize((width, height), Image.Resampling.BICUBIC))
            for cell in cells
        ]
    ) * (strength * max(width, height))
    places_2HW = np.mgrid[0:height, 0:width] + shift_2HW

    def bent(image: Image.Image) -> Image.Image:
        pixels_HW3 = np.asarray(image)
        moved = [
            ndimage.map_coordinates(pixels_HW3[..., channel], places_2HW, order=1, mode="nearest")
            for channel in range(3)
        ]
        return Image.fromarray(np.ascontiguousarray(np.stack(moved, axis=-1)))

    return [*frames[:at], *map(bent, frames[at : at + length]), *frames[at + length :]]
