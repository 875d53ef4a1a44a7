"""The scores of a stream over time as SVG, with its events marked, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from apt_ray.validation.report.curves import svg
from apt_ray.video.events import Event, EventLevels

_BINS = 2000
_COLOURS = {"anomaly": "#b3261e", "frozen": "#3b6fb6", "jump": "#d9822b"}
_LINE = "#7a8794"


class Trace:
    """The highest scores over time, of as many frames each as it takes to keep some thousand."""

    def __init__(self) -> None:
        self._width, self._count = 1, 0
        self._bins: list[tuple[float, float]] = []  # seconds, score; NaN where there is none

    def add(self, time_s: float, score: float | None) -> None:
        """The next frame."""
        value = math.nan if score is None else score
        if self._count % self._width == 0:
            self._bins.append((time_s, value))
        else:
            self._bins[-1] = _higher(self._bins[-1], (time_s, value))
        self._count += 1
        if len(self._bins) > _BINS and self._count % (2 * self._width) == 0:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [_higher(*pair) for pair in pairs]
            self._width *= 2

    @property
    def points(self) -> tuple[list[float], list[float]]:
        """Seconds, and the highest scores there; NaN where nothing was inspected."""
        return [time_s for time_s, _ in self._bins], [score for _, score in self._bins]


def draw_timeline(trace: Trace, events: Sequence[Event], levels: EventLevels) -> str:
    """The scores of a stream, the levels between which events begin and end, and the events."""

    def draw(axes: Axes) -> None:
        seconds, scores = trace.points
        axes.plot(seconds, scores, color=_LINE, linewidth=0.8, marker=".", markersize=2.5)
        axes.axhline(levels.begin, color="black", linestyle="--", linewidth=0.9, label="threshold")
        axes.axhline(levels.end, color="black", linestyle=":", linewidth=0.9, label="end")
        labelled: set[str] = set()
        for event in events:
            label = None if event.kind in labelled else event.kind
            labelled.add(event.kind)
            colour = _COLOURS[event.kind]
            axes.axvspan(event.start_s, event.end_s, color=colour, alpha=0.35, label=label)
            if event.peak_score is not None:
                axes.plot(event.peak_s, event.peak_score, "v", color=colour, markersize=5)
        axes.set(xlabel="seconds", ylabel="anomaly score")
        axes.legend(frameon=False, fontsize=8, loc="upper right")

    return svg(draw, size=(11, 3.3))


def _higher(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return other if math.isnan(one[1]) or other[1] > one[1] else one
