"""Watching a stream: which frames are inspected, and what becomes of their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image
from pydantic import Field

from apt_ray.config import Settings
from apt_ray.detection.calibration import Threshold
from apt_ray.errors import DataError, ImageError
from apt_ray.images import decode_image
from apt_ray.video.changes import CameraNoise, Feed, SmallFrame, is_changed, small_frame
from apt_ray.video.events import Event, EventLevels, EventRegion, Events, Seen
from apt_ray.video.frames import Frame
from apt_ray.video.part import PartView
from apt_ray.video.settings import WatchSettings

Verdict = Literal["inspect", "unchanged", "no part", "damaged"]
"""What a frame costs: a pass of the detector, or nothing, for which reason."""

MOST_REGIONS = 5
"""The most regions that an event has, worst first."""

# Frames behind one that waits for its batch.
_MOST_WAITING = 64


class WatchSummary(Settings):
    """What a stream came to."""

    frames: int = Field(description="That were looked at.")
    inspected: int = Field(description="That passed through the detector.")
    unchanged: int = Field(description="That took the score of the frame before.")
    no_part: int = Field(description="That showed no whole part.")
    damaged: int = Field(description="That could not be decoded.")
    seconds: float = Field(description="From the first frame to the last, in the stream's time.")
    anomalies: int
    frozen: int
    jumps: int
    is_cut_off: bool = Field(
        description="Whether it ended within a frame, which is among the damaged ones."
    )

    @property
    def advice(self) -> str:
        """What is wrong with the stream as a whole, and the remedy; empty if nothing is."""
        if self.no_part and self.no_part + self.damaged == self.frames:
            return (
                "no frame showed a whole part as the good pictures do, so nothing was inspected:"
                " learn from pictures of this camera, or have every frame inspected (--part any)"
            )
        if self.is_cut_off:
            return (
                "the stream ended within a frame, which was not inspected: look at what sends it,"
                " unless that was meant"
            )
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What is known of a frame before it is inspected.

    Attributes:
        verdict: what it costs.
        is_frozen, is_jump: what the feed does.
        is_cut_off: whether the stream ended within it.
    """

    verdict: Verdict
    is_frozen: bool = False
    is_jump: bool = False
    is_cut_off: bool = False


class Watch:
    """One stream. `look` at each frame in order, and `tell` what became of it in the same order;
    any number of frames may lie between the two.

    Args:
        levels: which scores make an event.
        settings: how the stream is watched.
        part: what a whole part looks like; None inspects every frame.
    """

    def __init__(
        self,
        levels: EventLevels,
        settings: WatchSettings,
        *,
        part: PartView | None = None,
    ) -> None:
        self.levels = levels
        """Which scores make an event."""
        self._events = Events(levels, frames=settings.event_frames, end_frames=settings.end_frames)
        self._settings = settings
        self._part = part
        self._noise = CameraNoise()
        self._feed = Feed(frozen_frames=settings.frozen_frames, jumps=settings.jumps)
        self._before: SmallFrame | None = None
        self._inspected: SmallFrame | None = None
        self._last = Seen(index=0, time_s=0.0)
        self._counts = dict.fromkeys(("inspect", "unchanged", "no part", "damaged"), 0)
        self._kinds = dict.fromkeys(("anomaly", "frozen", "jump"), 0)
        self._seconds = 0.0
        self._is_cut_off = False

    @classmethod
    def of(
        cls,
        threshold: Threshold,
        settings: WatchSettings | None = None,
        *,
        pictures: Sequence[bytes] = (),
    ) -> Watch:
        """The watch of a stream of what a prompt set was fitted to.

        Args:
            threshold: `PromptSet.threshold`.
            settings: how the stream is watched.
            pictures: `PromptSet.thumbnails`: where they show a part on a ground, the frames alone
                are inspected that show a whole one. Without them all are.
        """
        part = PartView.of([decode_image(picture) for picture in pictures])
        levels = EventLevels.of(threshold.value, threshold.scores)
        return cls(levels, settings or WatchSettings(), part=part)

    def look(self, image: Image.Image) -> Look:
        """What the next frame, RGB, costs."""
        frame = small_frame(image)
        is_frozen, is_jump = self._feed.look(frame)
        if self._before is not None:
            self._noise.learn(self._before, frame)
        self._before = frame
        verdict: Verdict = "inspect"
        if self._part is not None and not self._part.is_in(frame):
            verdict = "no part"
        elif self._is_unchanged(frame):
            verdict = "unchanged"
        if verdict == "inspect":
            self._inspected = frame
        return Look(verdict=verdict, is_frozen=is_frozen, is_jump=is_jump)

    def _is_unchanged(self, frame: SmallFrame) -> bool:
        inspected = self._inspected if self._settings.gate else None
        return inspected is not None and not is_changed(inspected, frame, self._noise)

    def tell(
        self,
        look: Look,
        *,
        index: int,
        time_s: float,
        score: float | None = None,
        regions: tuple[EventRegion, ...] = (),
        evidence: Any = None,
    ) -> tuple[float | None, list[Event]]:
        """What became of a frame: its score, as it counts, and what begins or ends with it.

        Args:
            look: what was said of the frame.
            index, time_s: those of the frame.
            score: its anomaly score, if it was inspected and that did not fail.
            regions: what lies above the threshold.
            evidence: kept for the peak of an event, see `evidence`.
        """
        self._counts[look.verdict] += 1
        self._seconds = time_s
        self._is_cut_off |= look.is_cut_off
        if look.verdict == "unchanged":
            score, regions, evidence = self._last.score, self._last.regions, self._last.evidence
        seen = Seen(
            index=index,
            time_s=time_s,
            score=score,
            regions=regions,
            has_part=look.verdict != "no part",
            is_frozen=look.is_frozen,
            is_jump=look.is_jump,
            evidence=evidence,
        )
        if look.verdict == "inspect":
            self._last = seen
        return score, self._counted(self._events.add(seen))

    def use(self, levels: EventLevels) -> None:
        """From now on these scores make an event."""
        self.levels = self._events.levels = levels

    def finish(self) -> list[Event]:
        """The events that end with the stream."""
        return self._counted(self._events.finish())

    @property
    def evidence(self) -> Any:
        """That of the peak of the anomaly that was told last."""
        return self._events.evidence

    @property
    def summary(self) -> WatchSummary:
        """What the stream came to so far."""
        return WatchSummary(
            frames=sum(self._counts.values()),
            inspected=self._counts["inspect"],
            unchanged=self._counts["unchanged"],
            no_part=self._counts["no part"],
            damaged=self._counts["damaged"],
            seconds=round(self._seconds, 3),
            anomalies=self._kinds["anomaly"],
            frozen=self._kinds["frozen"],
            jumps=self._kinds["jump"],
            is_cut_off=self._is_cut_off,
        )

    def _counted(self, events: list[Event]) -> list[Event]:
        for event in events:
            self._kinds[event.kind] += event.is_over
        return events


class Inspected(Protocol):
    """What `watch_frames` asks of an inspection, `apt_ray.Inspection`."""

    @property
    def anomaly_score(self) -> float: ...

    @property
    def regions(self) -> Sequence[Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A frame, and what it came to.

    Attributes:
        index, time_s: those of the frame.
        verdict: what it cost.
        score: its anomaly score, as it counts; None if it has none.
        error: what is wrong with it; empty if it could be decoded.
        events: what begins or ends with it.
    """

    index: int
    time_s: float
    verdict: Verdict
    score: float | None
    error: str
    events: list[Event]


def watch_frames(
    watch: Watch,
    frames: Iterable[Frame],
    inspect: Callable[[list[Image.Image]], Sequence[Inspected]],
    *,
    batch: int = 8,
) -> Iterator[Watched]:
    """Watch frames by a detector in this process, in batches.

    Evidence of a frame is its image and its inspection.

    Args:
        watch: is told of them.
        frames: in order.
        inspect: `Detector.inspect`.
        batch: frames that are inspected at a time.
    """
    waiting: list[tuple[Frame, Look, Image.Image | None, str]] = []
    images: list[Image.Image] = []

    def judged() -> Iterator[Watched]:
        found = iter(inspect(images) if images else ())
        for frame, look, image, error in waiting:
            inspection = next(found) if image is not None else None
            score, events = watch.tell(
                look,
                index=frame.index,
                time_s=frame.time_s,
                score=None if inspection is None else inspection.anomaly_score,
                regions=() if inspection is None else event_regions(inspection.regions),
                evidence=None if inspection is None else (image, inspection),
            )
            yield Watched(
                index=frame.index,
                time_s=frame.time_s,
                verdict=look.verdict,
                score=score,
                error=error,
                events=events,
            )
        waiting.clear()
        images.clear()

    for frame in frames:
        image, error = None, ""
        try:
            loaded = frame.load()
            look = watch.look(loaded)
            if look.verdict == "inspect":
                image = loaded
                images.append(loaded)
        except (ImageError, DataError) as failure:
            look = Look(verdict="damaged", is_cut_off=frame.is_cut_off)
            error = str(failure)
        waiting.append((frame, look, image, error))
        if not images or len(images) >= batch or len(waiting) >= _MOST_WAITING:
            yield from judged()
    yield from judged()


def event_regions(regions: Sequence[Any]) -> tuple[EventRegion, ...]:
    """Regions of an inspection as events have them; the worst few."""
    fields = EventRegion.model_fields
    return tuple(
        EventRegion(**{name: getattr(region, name) for name in fields})
        for region in regions[:MOST_REGIONS]
    )
