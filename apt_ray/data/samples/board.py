"""The drawing board of the made-up products: shapes, noise, paint, and a camera.

Legend: S side of the square board in pixels. Coordinates x, y run from -1 to 1, right and down;
colours, coverages and tones from 0 to 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Field = NDArray[np.floating[Any]]  # float32 throughout, for speed
Colour = tuple[float, float, float]

_SUPERSAMPLING = 2


@dataclass(slots=True)
class Board:
    """An image being drawn: pixels (3, S, S) and, so far, the ground truth (S, S)."""

    rng: np.random.Generator
    x: Field
    y: Field
    pixels: Field
    truth: Field

    @classmethod
    def blank(cls, rng: np.random.Generator, size: int) -> "Board":
        """A black board for a photograph of `size` pixels."""
        side = size * _SUPERSAMPLING
        axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
        x, y = np.meshgrid(axis, axis)
        return cls(rng, x, y, np.zeros((3, side, side), np.float32), np.zeros_like(x))

    @property
    def side(self) -> int:
        return len(self.x)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def about(self, mean: float, deviation: float) -> float:
        return float(self.rng.normal(mean, deviation))

    def noise(self, cells: int, cells_y: int | None = None) -> Field:
        """Smooth noise around 0 with a deviation near 1 and `cells` bumps across."""
        shape = ((cells_y or cells) + 2, cells + 2)
        grid = Image.fromarray(self.rng.standard_normal(shape, dtype=np.float32))
        box = (0.5, 0.5, shape[1] - 0.5, shape[0] - 0.5)
        field = grid.resize((self.side, self.side), Image.Resampling.BICUBIC, box)
        return np.asarray(field, np.float32) * np.float32(1.25)

    def cover(self, distance: Field, softness: float = 0.0) -> Field:
        """Coverage by the shape whose signed distance (negative inside) is given."""
        coverage: Field = np.clip(0.5 - distance / max(2 / self.side, softness), 0, 1)
        return coverage

    def blob(self, x: float, y: float, radius: float, roughness: float = 0.0) -> Field:
        """Signed distance, roughly, to a disc with an irregular outline."""
        dx, dy = self.x - x, self.y - y
        angle = np.arctan2(dy, dx)
        distance: Field = np.hypot(dx, dy) - radius
        for k in range(2, 7):
            swing = roughness * radius * self.between(0.5, 1.5) / k
            distance += swing * np.cos(k * angle + self.between(0, 2 * math.pi))
        return distance

    def stroke(
        self, x: float, y: float, heading: float, length: float, width: float, bend: float = 0.3
    ) -> Field:
        """Coverage by a curved stroke from (x, y); `bend` is the turn in radians over it all."""
        steps = 24
        turns = heading + self.rng.normal(0, bend / math.sqrt(steps), steps).cumsum()
        xs = x + np.append(0, np.cos(turns).cumsum()) * length / steps
        ys = y + np.append(0, np.sin(turns).cumsum()) * length / steps
        points = (np.stack([xs, ys], axis=-1) + 1) * (self.side / 2)
        canvas = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(canvas).line(
            [(float(px), float(py)) for px, py in points],
            fill=255,
            width=max(2, round(width * self.side / 2)),
            joint="curve",
        )
        return ndimage.gaussian_filter(np.asarray(canvas, np.float32) / 255, 0.7)

    def paint(
        self, colour: Colour, coverage: Field | float = 1.0, tone: Field | float = 1.0
    ) -> None:
        """Lays `colour` times `tone` over the covered area."""
        for channel, value in enumerate(colour):
            self.pixels[channel] += (value * tone - self.pixels[channel]) * coverage

    def shade(
        self, factor: Field | float, coverage: Field | float, colour: Colour = (1, 1, 1)
    ) -> None:
        """Multiplies the covered area by `factor` times `colour`."""
        for channel, value in enumerate(colour):
            self.pixels[channel] *= 1 + (value * factor - 1) * coverage

    def uncover(self, layer: Field, coverage: Field) -> None:
        """Brings back an earlier state of the pixels in the covered area."""
        self.pixels += (layer - self.pixels) * coverage

    def mark(self, coverage: Field) -> None:
        """Adds the covered area to the ground truth."""
        np.maximum(self.truth, coverage, out=self.truth)

    def photograph(self, rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.bool_]]:
        """The board as a camera sees it, and its ground-truth mask (H, W)."""
        tilt_x, tilt_y = rng.normal(0, 0.05, 2)
        light = 1 + tilt_x * self.x + tilt_y * self.y - 0.09 * (self.x**2 + self.y**2)
        exposed = np.clip(self.pixels * (light * rng.uniform(0.93, 1.07)), 0, 1)
        pixels = ndimage.gaussian_filter(binned(exposed), (0, 0.4, 0.4))
        grain = 0.008 + 0.010 * np.sqrt(pixels)
        pixels += grain * rng.standard_normal(pixels.shape, dtype=np.float32)
        levels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(np.moveaxis(levels, 0, -1)))
        return image, binned(self.truth) >= 0.1


def binned(field: Field) -> Field:
    """Means of squares of `_SUPERSAMPLING` pixels over the last two axes."""
    steps = [slice(start, None, _SUPERSAMPLING) for start in range(_SUPERSAMPLING)]
    total = sum(field[..., row, column] for row in steps for column in steps)
    return np.asarray(total, np.float32) / _SUPERSAMPLING**2
