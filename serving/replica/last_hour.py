"""What a replica's images came to in the last hour, by category."""

import time
from collections import Counter, deque
from collections.abc import Callable

from serving.controller.activity import LATENCY_BINS, SCORE_BINS, Counts, latency_bin, score_bin

_MINUTES = 60
# Where a category's counts lie side by side: scores, latencies, how many were rejected.
_LATENCIES = SCORE_BINS
_REJECTED = SCORE_BINS + LATENCY_BINS


class LastHour:
    """Sixty minutes of each category, this one included; of one thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hours: dict[str, _Hour] = {}

    def add(self, category: str, *, score: float, is_anomalous: bool, ms: float) -> None:
        """An image was answered, `ms` milliseconds after it was there."""
        hour = self._hours.setdefault(category, _Hour())
        minute = hour.at(self._minute)
        for place in (
            score_bin(score),
            _LATENCIES + latency_bin(ms),
            *([_REJECTED] if is_anomalous else []),
        ):
            minute[place] += 1
            hour.total[place] += 1

    def counts(self) -> dict[str, Counts]:
        """What the hour came to, for each category that had any image in it."""
        for category, hour in list(self._hours.items()):
            hour.forget_before(self._minute - _MINUTES + 1)
            if not hour.minutes:
                del self._hours[category]
        return {
            category: Counts(
                rejected=hour.total[_REJECTED],
                scores=tuple(hour.total[:_LATENCIES]),
                latencies=tuple(hour.total[_LATENCIES:_REJECTED]),
            )
            for category, hour in self._hours.items()
        }

    @property
    def _minute(self) -> int:
        return int(self._clock() // 60)


class _Hour:
    """The minutes that had images, each by its number, and what they come to together."""

    def __init__(self) -> None:
        self.minutes: deque[tuple[int, Counter[int]]] = deque()
        self.total = [0] * (_REJECTED + 1)

    def at(self, number: int) -> Counter[int]:
        """The minute of this number, the newest."""
        if not self.minutes or self.minutes[-1][0] != number:
            self.forget_before(number - _MINUTES + 1)
            self.minutes.append((number, Counter()))
        return self.minutes[-1][1]

    def forget_before(self, number: int) -> None:
        while self.minutes and self.minutes[0][0] < number:
            for place, images in self.minutes.popleft()[1].items():
                self.total[place] -= images
