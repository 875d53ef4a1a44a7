"""Who may wait in a replica: an image whose turn would come too late is refused at once.

What an image costs is measured on its category's images. Two stages run side by side, the model
and several threads that decode and conclude, and the slower one sets the pace. A turn is as far
away as all that comes before it costs, with one image of each waiting category in turn (see
`batching`).
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from serving.api import problems
from serving.replica.meter import Meter

Stage = Literal["decode", "model", "conclude"]

# Weight of the newest measurement.
_SMOOTHING = 0.2
# Until the first image of a category is decoded: about what a photograph's JPEG file takes.
_SECONDS_PER_BYTE = 40e-9


class Admission:
    """The images that wait in a replica, and what they cost.

    Args:
        max_wait_s: how long an image may have to wait for its turn, unless its caller says.
        shared: whether several categories share the replica.
        decoders: threads that decode and conclude.
        meter: is told how many wait; None where nothing counts.
    """

    def __init__(
        self, *, max_wait_s: float, shared: bool, decoders: int, meter: Meter | None = None
    ) -> None:
        self._max_wait_s = max_wait_s
        self._shared = shared
        self._decoders = decoders
        self._meter = meter
        self._waiting: Counter[str] = Counter()  # none is zero
        self._seconds: dict[tuple[str, Stage], float] = {}

    @property
    def waiting(self) -> int:
        """Images that were admitted and are not done."""
        return self._waiting.total()

    def expect(self, category: str, seconds: float) -> None:
        """The model will take so long for an image of this category, until more is measured."""
        self._seconds[category, "model"] = seconds

    def took(self, category: str, stage: Stage, seconds: float) -> None:
        """An image of this category took so long in this stage; its share, if others did too."""
        before = self._seconds.get((category, stage), seconds)
        self._seconds[category, stage] = before + _SMOOTHING * (seconds - before)

    @contextmanager
    def admitted(self, category: str, size: int, timeout_s: float | None) -> Iterator[None]:
        """A place in the queue for an image file of `size` bytes, kept until the block ends.

        Raises ProblemError if its turn would come after `timeout_s`, by which its caller wants the
        answer, or where no time is given after the replica's own limit.
        """
        self._seconds.setdefault((category, "decode"), size * _SECONDS_PER_BYTE)
        wait_s = self._wait_s(category)
        if timeout_s is None:
            limit_s, limit = self._max_wait_s, f"later than the {self._max_wait_s:g} s accepted"
        else:
            limit_s, limit = timeout_s - self._cost_s(category), f"and {timeout_s:.2f} s are left"
        if wait_s > limit_s:
            # In a shared replica the queue may be long for those alone who fill it.
            full = problems.overloaded
            if self._shared and self._waiting[category] and self._wait_s("") <= limit_s:
                full = problems.too_many
            own = f", {self._waiting[category]} of them of {category}" if self._shared else ""
            raise full(
                f"{self.waiting} images are waiting for this replica already{own}: this one's turn"
                f" would come in about {wait_s:.1f} s, {limit}",
                retry_after_s=max(1, math.ceil(wait_s)),
            )
        self._count(category, +1)
        try:
            yield
        finally:
            self._count(category, -1)

    def _wait_s(self, category: str) -> float:
        """Seconds until the turn of one more image of the category."""
        turn = self._waiting[category] + 1
        return sum(
            self._cost_s(name) * min(waiting, turn) for name, waiting in self._waiting.items()
        )

    def _cost_s(self, category: str) -> float:
        decode, model, conclude = (
            self._seconds.get((category, stage), 0.0) for stage in get_args(Stage)
        )
        return max(model, (decode + conclude) / self._decoders)

    def _count(self, category: str, change: int) -> None:
        self._waiting[category] += change
        if self._meter:
            self._meter.queue(category, self._waiting[category])
        if not self._waiting[category]:
            del self._waiting[category]
