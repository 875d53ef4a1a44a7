"""Scores of frames become events: what begins, when it was worst, and when it ended.

Two levels, as in a Schmitt trigger (O. H. Schmitt, A thermionic trigger, J. Sci. Instrum. 15,
1938), so that a score that trembles around the threshold is one event and not ten.

**False alarms.** If a share of at most `a` of the frames of good parts scores above the threshold,
there are at most `a / k` events a frame, since each takes `k` frames above it that no other event
has; and at most `n a / k` of the parts are events where each is seen in `n` frames, `k` or more
(Markov's inequality). Both hold however much the frames of one part resemble one another, and both
leave out the events that one frame makes at once. `a` is the false-alarm rate of the prompt set's
threshold, where that is certified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from apt_ray.config import Settings

EventKind = Literal["anomaly", "frozen", "jump"]

_LEAST_STEP = 0.02  # between the levels, where the threshold lies on top of the good parts' scores


class EventLevels(Settings):
    """Which anomaly scores make an event."""

    begin: float = Field(description="A frame with a higher score counts for an event.")
    end: float = Field(description="A frame with no higher score counts against it.")
    at_once: float = Field(description="One frame with a higher score is an event.")

    @classmethod
    def of(cls, threshold: float, normal_scores: Sequence[float]) -> EventLevels:
        """The levels that follow from a prompt set's threshold.

        An event begins above the threshold and ends half way from it to the median score of good
        parts; as far above the threshold as that lies below it, one frame is enough.

        Args:
            threshold: above which an image is anomalous.
            normal_scores: of the good parts that it comes from.
        """
        below = threshold - median(normal_scores) if normal_scores else 0.0
        step = max(below, _LEAST_STEP)
        return cls(begin=threshold, end=threshold - step / 2, at_once=threshold + step)


class EventRegion(Settings):
    """A connected area above the threshold, as a box in pixels of the frame."""

    x: int
    y: int
    width: int
    height: int
    peak: float = Field(description="Highest value of the anomaly map in it, 0..1.")
    area: int = Field(description="Pixels above the threshold.")


class Event(Settings):
    """Something that happened in a stream."""

    number: int = Field(description="Of the event in its stream, from 1.")
    kind: EventKind = Field(
        description="`anomaly`: a part is defective; `frozen`: the same frames come again and"
        " again; `jump`: frames are missing, or the camera was moved."
    )
    is_over: bool = Field(description="False when it is told that it has begun.")
    start: int = Field(description="Its first frame, from 0.")
    start_s: float = Field(description="Seconds from the stream's first frame.")
    end: int = Field(description="Its last frame so far.")
    end_s: float
    peak: int = Field(description="The frame with the highest score; the first of other kinds.")
    peak_s: float
    peak_score: float | None = Field(description="Its anomaly score, 0..1; null of other kinds.")
    regions: tuple[EventRegion, ...] = Field(default=(), description="Where, at the peak.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is known of a frame.

    Attributes:
        index, time_s: those of the frame.
        score: its anomaly score; None if it was not inspected.
        regions: what lies above the threshold.
        has_part: False where a frame shows no whole part, so that what was seen before has left.
        is_frozen, is_jump: what the feed does.
        evidence: kept for the frame with the highest score.
    """

    index: int
    time_s: float
    score: float | None = None
    regions: tuple[EventRegion, ...] = ()
    has_part: bool = True
    is_frozen: bool = False
    is_jump: bool = False
    evidence: Any = None


@dataclass(slots=True)
class _Run:
    """Frames that are, or may become, an event."""

    start: Seen
    end: Seen
    peak: Seen
    number: int = 0  # until it is an event

    def take(self, seen: Seen) -> None:
        self.end = seen
        if (seen.score or 0.0) > (self.peak.score or 0.0):
            self.peak = seen


class Events:
    """Finds the events of a stream, frame by frame, in memory that does not grow with it.

    Args:
        levels: which scores make one.
        frames: in a row, above `levels.begin`, that are an event; all frames of a part that is seen
            in fewer.
        end_frames: in a row, at `levels.end` or below, with which it is over.
    """

    def __init__(self, levels: EventLevels, *, frames: int, end_frames: int) -> None:
        self.levels = levels
        self._frames, self._end_frames = frames, end_frames
        self._number = 0
        self._run: _Run | None = None
        self._above = 0
        self._below = 0
        self._judged = 0  # frames of the part in view
        self._frozen: _Run | None = None
        self.evidence: Any = None
        """Of the peak of the anomaly that was told last."""

    def add(self, seen: Seen) -> list[Event]:
        """What begins and what ends with the next frame."""
        told = self._feed(seen)
        if not seen.has_part:
            told += self._leave()
        elif seen.score is not None:
            told += self._judge(seen, seen.score)
        return told

    def finish(self) -> list[Event]:
        """What ends with the stream."""
        return [*self._leave(), *self._thaw()]

    def _judge(self, seen: Seen, score: float) -> list[Event]:
        levels, told = self.levels, list[Event]()
        self._judged += 1
        if self._run is None:
            if score > levels.begin:
                self._run = _Run(seen, seen, seen)
                self._above, self._below = 0, 0
        elif score > levels.end:
            self._run.take(seen)
        if self._run is None:
            return told
        self._above = self._above + 1 if score > levels.begin else 0
        self._below = self._below + 1 if score <= levels.end else 0
        if not self._run.number:
            if self._above >= self._frames or score > levels.at_once:
                told.append(self._begin(self._run, "anomaly"))
            elif not self._above:
                self._run = None  # too short to be one
        elif self._below >= self._end_frames:
            told.append(self._end(self._run, "anomaly"))
            self._run = None
        return told

    def _leave(self) -> list[Event]:
        """The part has left: what was seen of it is all that there will be."""
        run, judged, told = self._run, self._judged, list[Event]()
        self._run, self._judged = None, 0
        if run is not None:
            if not run.number and self._above == judged:
                told.append(self._begin(run, "anomaly"))
            if run.number:
                told.append(self._end(run, "anomaly"))
        return told

    def _feed(self, seen: Seen) -> list[Event]:
        told = list[Event]()
        if seen.is_jump:
            jump = _Run(seen, seen, seen)
            self._begin(jump, "jump")
            told.append(self._end(jump, "jump"))
        if not seen.is_frozen:
            return [*told, *self._thaw()]
        if self._frozen is None:
            self._frozen = _Run(seen, seen, seen)
            told.append(self._begin(self._frozen, "frozen"))
        self._frozen.end = seen
        return told

    def _thaw(self) -> list[Event]:
        frozen, self._frozen = self._frozen, None
        return [] if frozen is None else [self._end(frozen, "frozen")]

    def _begin(self, run: _Run, kind: EventKind) -> Event:
        self._number += 1
        run.number = self._number
        return self._event(run, kind, is_over=False)

    def _end(self, run: _Run, kind: EventKind) -> Event:
        return self._event(run, kind, is_over=True)

    def _event(self, run: _Run, kind: EventKind, *, is_over: bool) -> Event:
        is_anomaly = kind == "anomaly"
        if is_anomaly:
            self.evidence = run.peak.evidence
        return Event(
            number=run.number,
            kind=kind,
            is_over=is_over,
            start=run.start.index,
            start_s=round(run.start.time_s, 3),
            end=run.end.index,
            end_s=round(run.end.time_s, 3),
            peak=run.peak.index,
            peak_s=round(run.peak.time_s, 3),
            peak_score=run.peak.score if is_anomaly else None,
            regions=run.peak.regions if is_anomaly else (),
        )
