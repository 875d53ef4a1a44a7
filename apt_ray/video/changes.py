"""Whether something has changed from one frame to another, beyond the noise of the camera.

B levels of brightness; frames are small, `(SIDE, SIDE, 3)`.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 80
"""Pixels a side of the small frames that are compared."""

SmallFrame = NDArray[np.float32]
"""`(SIDE, SIDE, 3)` in 0..255: means of the blocks of a frame."""

LIMIT = 5.0
"""Standard deviations of the noise above which the difference of a value is none of noise."""

CHANGED_SHARE = 0.001
"""Of a frame's values, above which the frame has changed: a fifth of what an anomaly score looks at
(`detection.rule.TOP_SHARE`). Fewer lie beyond the limit in blocks with an edge, by noise alone."""

_LEVELS = 8
_FEWEST = 64  # values of a level of brightness that say what its noise is
_SMALLEST_NOISE = 0.3  # of a level: what rounding to whole levels alone does
_DARK = 16.0  # below it a ratio says nothing of the light
_MOST_FLICKER = 0.1
# Where less of what is seen stays as it was, it moved, and the difference is no noise.
_STANDS_STILL = 0.8
_FORGETTING = 1.002  # the noise's estimate rises by half in two hundred frames
# The mean of the lowest three quarters of the absolute differences of two frames, in standard
# deviations of one, where they are Gaussian. A median of whole levels would be a whole level.
_KEPT, _MEAN_OF_KEPT = 0.75, 0.5149 * np.sqrt(2)


def small_frame(image: Image.Image) -> SmallFrame:
    """An RGB image as frames are compared."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small, np.float32)


class CameraNoise:
    """The noise of the camera that a stream is from, estimated from the stream itself.

    Photon noise grows with light, so each level of brightness has a noise of its own, from the
    absolute differences of two frames in a row but for the highest quarter, where something may
    have moved. Only frames count between which most of what is seen stood still (correlation of
    their fine structure), and the smallest estimate counts, slowly forgotten: motion can only add
    to a difference. Until it is known, the noise is that of rounding.
    """

    def __init__(self) -> None:
        self._sd_B = np.full(_LEVELS, _SMALLEST_NOISE)
        self._is_known_B = np.zeros(_LEVELS, np.bool_)

    @property
    def is_known(self) -> bool:
        """Whether any of the frames have told it."""
        return bool(self._is_known_B.any())

    def learn(self, before: SmallFrame, after: SmallFrame) -> None:
        """Take two frames in a row into account, unless they are equal or something moved."""
        difference = after - before * gain(before, after)
        if not difference.any() or _likeness(before, after) < _STANDS_STILL:
            return
        level, size = _level(before), np.abs(difference)
        for each in range(_LEVELS):
            inside = size[level == each]
            if len(inside) < _FEWEST:
                continue
            count = int(_KEPT * len(inside))
            kept = np.partition(inside, count)[:count]
            sd = max(float(kept.mean() / _MEAN_OF_KEPT), _SMALLEST_NOISE)
            known = self._sd_B[each] * _FORGETTING if self._is_known_B[each] else sd
            self._sd_B[each], self._is_known_B[each] = min(sd, known), True

    def sd(self, frame: SmallFrame) -> SmallFrame:
        """The standard deviation of the noise at each value of a frame, in levels of 0..255."""
        sd_B = self._sd_B
        if self.is_known:
            # Of a level that few values have, the noise is that of its neighbours.
            (known,) = self._is_known_B.nonzero()
            sd_B = np.interp(np.arange(_LEVELS), known, sd_B[known])
        return sd_B[_level(frame)].astype(np.float32)


def is_changed(before: SmallFrame, after: SmallFrame, noise: CameraNoise) -> bool:
    """Whether the frames differ by more than noise, and light that flickers a little."""
    light = gain(before, after)
    if abs(light - 1) > _MOST_FLICKER:
        return True
    expected = before * light
    sd = noise.sd(before) * np.float32(np.sqrt(2))
    is_far = np.abs(after - np.minimum(expected, 255)) > LIMIT * sd
    return bool(is_far.mean() > CHANGED_SHARE)


def gain(before: SmallFrame, after: SmallFrame) -> float:
    """How much brighter the second frame is, by the median of its blocks."""
    lit = (before > _DARK) & (after > _DARK) & (before < 250) & (after < 250)
    return float(np.median(after[lit] / before[lit])) if lit.sum() >= _FEWEST else 1.0


def _level(frame: SmallFrame) -> NDArray[np.intp]:
    level: NDArray[np.intp] = np.minimum(frame * (_LEVELS / 256), _LEVELS - 1).astype(np.intp)
    return level


def _likeness(before: SmallFrame, after: SmallFrame) -> float:
    """Correlation of what is fine in both frames, -1..1: differences of neighbouring blocks."""
    one, other = (np.diff(frame, axis=0).ravel() for frame in (before, after))
    power = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / power if power else 0.0


FeedFault = Literal["frozen", "jump"]


class Feed:
    """Whether the frames are still those of a camera: what a detector cannot see.

    A frozen camera shows a good part for ever. The noise of a live one makes every frame different
    from all others, so a run of frames that each equal one of the last `_REMEMBERED` to the last
    bit is a frozen feed, or one that repeats itself. A *jump* is a difference between two frames in
    a row far above those of the last `_REMEMBERED` pairs: frames were lost, or the camera moved.

    Args:
        frozen_frames: so many equal frames in a row are a frozen feed; 0 finds none.
        jumps: whether jumps are looked for.
    """

    _REMEMBERED = 64
    _FEWEST_PAIRS = 16
    _FAR = 8.0  # standard deviations, robust ones
    _TIMES = 1.5  # and so many times the largest of them

    def __init__(self, *, frozen_frames: int, jumps: bool) -> None:
        self._frozen_frames = frozen_frames
        self._jumps = jumps
        self._known: deque[int] = deque(maxlen=self._REMEMBERED)
        self._changes: deque[float] = deque(maxlen=self._REMEMBERED)
        self._repeated = 0
        self._has_noise = False
        self._before: SmallFrame | None = None

    def look(self, frame: SmallFrame) -> tuple[bool, bool]:
        """The next frame: whether the feed is frozen with it, and whether it jumped to it."""
        digest, before = hash(frame.tobytes()), self._before
        is_repeated = digest in self._known
        self._known.append(digest)
        self._before = frame
        self._repeated = self._repeated + 1 if is_repeated else 0
        self._has_noise |= before is not None and not is_repeated
        is_frozen = 0 < self._frozen_frames <= self._repeated and self._has_noise
        if before is None or is_repeated or not self._jumps:
            return is_frozen, False
        change = float(np.abs(frame - before * gain(before, frame)).mean())
        is_jump = len(self._changes) >= self._FEWEST_PAIRS and self._is_far(change)
        self._changes.append(change)
        return is_frozen, is_jump

    def _is_far(self, change: float) -> bool:
        known = np.array(self._changes)
        middle = float(np.median(known))
        spread = max(float(np.median(np.abs(known - middle))) * 1.4826, 0.05 * middle)
        return change > max(middle + self._FAR * spread, self._TIMES * float(known.max()))
