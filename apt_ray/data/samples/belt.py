"""A conveyor belt that carries washers past a camera, frame by frame, with known defects.

Legend: S side of a frame in pixels. Places on the belt are in the coordinates of a board, where a
frame is 2 wide.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from apt_ray.data.folders import GOOD
from apt_ray.data.samples.board import Board, Field, binned
from apt_ray.data.samples.products import Washer, lay_belt
from apt_ray.errors import SettingsError

PITCH = 1.8
"""From one place of a part to the next."""

_FADE = 2 - PITCH  # over which the belt of one place goes over into that of the next
EMPTY = ""
"""A place of the belt on which no part lies."""


@dataclass(frozen=True, slots=True)
class PartInView:
    """A part that a frame shows, whole or not.

    Attributes:
        number: its place on the belt, from 0.
        defect: `GOOD` or the kind of defect.
        x: where the middle of its place is, -1..1 from the left edge of the frame to the right.
    """

    number: int
    defect: str
    x: float


@dataclass(frozen=True, slots=True, eq=False)
class BeltFrame:
    """A frame, RGB, and the parts in it, the one that is nearest to the middle first."""

    image: Image.Image
    parts: tuple[PartInView, ...]


def draw_belt(
    parts: Sequence[str],
    *,
    seed: int = 0,
    size: int = 192,
    speed: float = 0.12,
    flicker: float = 0.02,
    stops: Mapping[int, int] = {},
) -> Iterator[BeltFrame]:
    """The frames in which the parts pass from right to left.

    Args:
        parts: what lies at each place of the belt: `GOOD`, a defect of the washer, or `EMPTY`.
        seed: of parts, belt and camera.
        size: S.
        speed: how far the belt moves from one frame to the next.
        flicker: standard deviation of the light from one frame to the next, a share of it.
        stops: place -> frames for which the belt stands still when that place is in the middle.
    """
    if wrong := sorted(set(parts) - {GOOD, EMPTY, *Washer.DEFECTS}):
        raise SettingsError(
            f"no part is {wrong[0]!r}: a washer is {GOOD} or has {', '.join(Washer.DEFECTS)}"
        )
    belt_rng, camera_rng = np.random.default_rng(seed).spawn(2)
    ribs = float(belt_rng.uniform(0, 2))
    # In drawn pixels, twice those of a frame. Bare belt before the first part and behind the last.
    step, view = round(PITCH * size), 2 * size
    places = [EMPTY, *parts, EMPTY]
    strip: deque[Field] = deque()
    drawn, first = 0, 0
    tilt_x, tilt_y = camera_rng.normal(0, 0.05, 2)
    for middle in _middles(len(parts), speed, stops):
        # The left edge of the frame, from the left edge of the first place, which is place -1.
        left = round((middle + PITCH) * size)
        while drawn < len(places) and drawn * step < left + view + step:
            strip.append(_place(places[drawn], belt_rng, ribs, size))
            drawn += 1
        while len(strip) > 1 and (first + 1) * step + 2 * size < left:
            strip.popleft()
            first += 1
        pixels = _window(strip, left - first * step, size)
        seen = [
            PartInView(number, defect, number * PITCH - middle)
            for number, defect in enumerate(parts)
            if defect != EMPTY and abs(number * PITCH - middle) < 1 + Washer.OUTER + 0.1
        ]
        seen.sort(key=lambda part: abs(part.x))
        light = 1 + camera_rng.normal(0, flicker)
        yield BeltFrame(_photograph(pixels, camera_rng, light, (tilt_x, tilt_y)), tuple(seen))


def _middles(count: int, speed: float, stops: Mapping[int, int]) -> Iterator[float]:
    """The place on the belt that is in the middle of each frame."""
    standing = dict(stops)
    steps = math.floor((count - 1) * PITCH / speed)
    for step in range(steps + 1):
        middle = step * speed
        yield middle
        passed = math.floor(middle / PITCH + 1e-9)
        for _ in range(standing.pop(passed, 0)):
            yield middle


def _place(part: str, rng: np.random.Generator, ribs: float, size: int) -> Field:
    """One place of the belt, (3, 2 S, 2 S)."""
    product_rng, defect_rng = rng.spawn(2)
    board = Board.blank(product_rng, size)
    if part == EMPTY:
        lay_belt(board, ribs)
        return board.pixels
    washer = Washer(board, ribs=ribs)
    board.rng = defect_rng
    if part != GOOD:
        getattr(washer, part)()
    return board.pixels


def _window(strip: Sequence[Field], left: int, size: int) -> Field:
    """The pixels (3, 2 S, 2 S) from column `left` of the strip on."""
    step, side, fade = round(PITCH * size), 2 * size, round(_FADE * size)
    ramp = (np.arange(fade, dtype=np.float32) + 0.5) / fade
    weight = np.ones(side, np.float32)
    weight[:fade], weight[-fade:] = ramp, ramp[::-1]
    window = np.zeros((3, side, side), np.float32)
    for number, place in enumerate(strip):
        start = number * step - left
        if -side < start < side:
            into = slice(max(start, 0), min(start + side, side))
            of = slice(into.start - start, into.stop - start)
            window[..., into] += place[..., of] * weight[of]
    return window


def _photograph(
    pixels: Field, rng: np.random.Generator, light: float, tilt: tuple[float, float]
) -> Image.Image:
    """What a camera sees that stands still, as `Board.photograph`."""
    axis = (np.arange(pixels.shape[-1], dtype=np.float32) + 0.5) / pixels.shape[-1] * 2 - 1
    x, y = axis[None, :], axis[:, None]
    field = 1 + tilt[0] * x + tilt[1] * y - 0.09 * (x**2 + y**2)
    exposed = np.clip(pixels * (field * light), 0, 1)
    seen = ndimage.gaussian_filter(binned(exposed), (0, 0.4, 0.4))
    seen += (0.008 + 0.010 * np.sqrt(seen)) * rng.standard_normal(seen.shape, dtype=np.float32)
    levels = np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(levels, 0, -1)))
