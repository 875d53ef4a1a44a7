"""`apt-ray inspect` of a video: events out, as they happen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from apt_ray.cli.flags import add_flags, count, given, number
from apt_ray.errors import DataError, SettingsError
from apt_ray.files import is_within, write_whole, writing
from apt_ray.text import printable

if TYPE_CHECKING:
    from apt_ray.cli.common import WriteJson
    from apt_ray.detection.detector import Detector
    from apt_ray.export.exported import ExportedDetector
    from apt_ray.validation.report.timeline import Trace
    from apt_ray.video.events import Event, EventLevels
    from apt_ray.video.frames import Every, Frame
    from apt_ray.video.settings import WatchSettings
    from apt_ray.video.watch import Watch, Watched

_PIPE = Path("-")
_BATCH = 8
# What is told at the end; of an endless stream, the last ones.
_MOST_EVENTS = 10_000


def add_flags_to(inspect: argparse.ArgumentParser) -> None:
    """Add the flags of a video."""
    from apt_ray.video.settings import WatchSettings

    group = inspect.add_argument_group("video", "frames that follow one another; see docs/video.md")
    group.add_argument(
        "--fps",
        type=number(float, least=0.001),
        help="read what is given as one video of so many frames a second: also a folder of numbered"
        " frames, or an animated PNG, WebP or TIFF",
    )
    group.add_argument(
        "--every",
        type=_every,
        metavar="N",
        help="look at each N-th frame, or, as in 0.2s, at one in so many seconds (1)",
    )
    group.add_argument(
        "--part",
        choices=("whole", "any"),
        help="whole: where the good pictures show a part on a ground, inspect the frames that show"
        " one as whole as they do; any: inspect all frames (whole)",
    )
    group.add_argument(
        "--batch", type=count, help=f"frames inspected at a time ({_BATCH}; of a pipe 1)"
    )
    add_flags(group, WatchSettings, prefix="watch_")


def _every(text: str) -> Every:
    from apt_ray.video.frames import Every

    try:
        return Every.parse(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_given(options: argparse.Namespace) -> bool:
    """Whether the command is to inspect a video. SettingsError if it is one among others, or if
    there is none and flags of a video are given."""
    from apt_ray.video.frames import is_stream

    paths: list[Path] = options.images
    named = [path for path in paths if path == _PIPE or (is_stream(path) and not path.is_dir())]
    if not named and options.fps is None:
        if flags := _given_flags(options):
            raise SettingsError(
                f"without --fps {printable(paths[0])} is inspected image by image, and"
                f" {', '.join(flags)} would do nothing: give --fps for a video, or leave them out"
            )
        return False
    if len(paths) > 1:
        raise SettingsError(
            f"{printable((named or paths)[0])} is a video, and one is inspected at a time: give it"
            f" alone"
        )
    return True


def _given_flags(options: argparse.Namespace) -> list[str]:
    """The flags of a video that were given."""
    from apt_ray.video.settings import WatchSettings

    of_settings = (f"watch_{name}" for name in WatchSettings.model_fields)
    values = {name: getattr(options, name) for name in ("every", "part", "batch", *of_settings)}
    return [
        f"--{'no-' if value is False else ''}{name.removeprefix('watch_').replace('_', '-')}"
        for name, value in values.items()
        if value is not None
    ]


def run(
    options: argparse.Namespace,
    load: Callable[[Path, str], Detector | ExportedDetector],
    write: WriteJson,
) -> int:
    """Inspect a video, and `write` what it came to; returns the exit status."""
    from apt_ray.video.settings import WatchSettings
    from apt_ray.video.watch import watch_frames

    (path,) = options.images
    if options.out is not None and path.is_dir() and is_within(options.out, path):
        raise DataError(
            f"overlays in {options.out} would lie among the frames in {path} and be taken for some:"
            f" give another --out"
        )
    settings = given(options, WatchSettings, prefix="watch_")
    detector = load(options.prompt_set, options.device)
    watch = _watch(detector, settings, options.part or "whole")
    is_pipe = path == _PIPE
    batch = options.batch or (1 if is_pipe else _BATCH)
    ended: list[Event] = []
    with ExitStack() as stack:
        kept = _Kept(stack, options.out, watch.levels) if options.out is not None else None
        try:
            frames = _frames(options, detector)
            shown = tqdm(frames, desc="inspecting", unit=" frames", leave=False, disable=None)
            for watched in watch_frames(watch, shown, detector.inspect, batch=batch):
                _take(watched, watch, kept, ended)
        finally:
            # Also when it is interrupted: a live stream ends in no other way.
            for event in watch.finish():
                _tell(event, watch, kept, ended)
            summary = watch.summary
            if kept is not None:
                kept.draw(ended)
            write(
                {
                    "video": printable(path),
                    "category": detector.category,
                    "levels": watch.levels.model_dump(),
                    "summary": summary.model_dump(),
                    "events": [event.model_dump() for event in ended],
                }
            )
            print(
                f"{summary.frames} frames in {summary.seconds:g} s: {summary.anomalies} anomalies;"
                f" {summary.inspected} inspected, {summary.unchanged} unchanged, {summary.no_part}"
                f" without a whole part, {summary.damaged} damaged;"
                f" frozen {summary.frozen}, jumps {summary.jumps}"
            )
            if summary.advice:
                print(f"warning: {summary.advice}", file=sys.stderr)
    if not summary.frames:
        print("error: no frame came: check what sends or holds them", file=sys.stderr)
        return 1
    if summary.damaged == summary.frames:
        print("error: no frame could be decoded: see what is said of them", file=sys.stderr)
        return 1
    return 0


class _Kept:
    """What a video leaves in the folder of `--out`, written as it comes."""

    def __init__(self, stack: ExitStack, out: Path, levels: EventLevels) -> None:
        from apt_ray.optional import require

        out.mkdir(parents=True, exist_ok=True)
        self._out, self._levels = out, levels
        self._events: TextIO = stack.enter_context((out / "events.jsonl").open("w"))
        self._scores: TextIO = stack.enter_context((out / "scores.csv").open("w"))
        self._scores.write("frame,seconds,verdict,score\n")
        self._trace: Trace | None = None
        try:
            require("matplotlib", extra="report")
            from apt_ray.validation.report.timeline import Trace

            self._trace = Trace()
        except ImportError as error:
            print(f"note: no timeline is drawn ({error})", file=sys.stderr)

    def score(self, watched: Watched) -> None:
        """Note the score of a frame."""
        score = "" if watched.score is None else f"{watched.score:.6f}"
        self._scores.write(f"{watched.index},{watched.time_s:.3f},{watched.verdict},{score}\n")
        if self._trace is not None:
            self._trace.add(watched.time_s, watched.score)

    def event(self, event: Event, watch: Watch) -> None:
        """Note an event that is over, and draw its worst frame."""
        from apt_ray.images import draw_overlay

        self._events.write(f"{event.model_dump_json()}\n")
        self._events.flush()
        if event.kind == "anomaly" and watch.evidence is not None:
            image, inspection = watch.evidence
            drawn = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
            with writing(self._out / f"event-{event.number:04d}.png") as place:
                drawn.save(place, format="PNG")

    def draw(self, events: list[Event]) -> None:
        """Draw the scores over time."""
        if self._trace is not None:
            from apt_ray.validation.report.timeline import draw_timeline

            drawn = draw_timeline(self._trace, events, self._levels)
            write_whole(self._out / "timeline.svg", drawn)


def _take(watched: Watched, watch: Watch, kept: _Kept | None, ended: list[Event]) -> None:
    if watched.error:
        tqdm.write(f"damaged   {printable(watched.error)}")
    if kept is not None:
        kept.score(watched)
    for event in watched.events:
        _tell(event, watch, kept, ended)
    if watched.events:
        sys.stdout.flush()


def _tell(event: Event, watch: Watch, kept: _Kept | None, ended: list[Event]) -> None:
    if not event.is_over:
        tqdm.write(f"{event.kind:9} {event.number:4}  from {event.start_s:.2f} s")
        return
    ended.append(event)
    del ended[:-_MOST_EVENTS]
    if kept is not None:
        kept.event(event, watch)
    worst = ""
    if event.peak_score is not None:
        worst = f"  worst {event.peak_score:.4f} at frame {event.peak}"
    tqdm.write(
        f"{event.kind:9} {event.number:4}  {event.start_s:.2f} to {event.end_s:.2f} s, frames"
        f" {event.start} to {event.end}{worst}"
    )


def _frames(options: argparse.Namespace, detector: Detector | ExportedDetector) -> Iterator[Frame]:
    from apt_ray.video.frames import Every, frames_of_pipe, read_frames

    (path,) = options.images
    if path == _PIPE:
        frames = frames_of_pipe(sys.stdin.buffer, detector.reading, fps=options.fps)
    else:
        frames = read_frames(path, detector.reading, fps=options.fps)
    every: Every = options.every or Every()
    return (frame for frame in frames if every.takes(frame.index, frame.time_s) or frame.is_cut_off)


def _watch(detector: Detector | ExportedDetector, settings: WatchSettings, part: str) -> Watch:
    from apt_ray.detection.detector import Detector
    from apt_ray.video.watch import Watch

    pictures: tuple[bytes, ...] = ()
    if isinstance(detector, Detector):
        threshold, pictures = detector.prompt_set.threshold, detector.prompt_set.thumbnails
    else:
        threshold = detector.threshold
    if part == "whole" and not pictures:
        print(
            "note: all frames are inspected: this file holds no pictures of whole parts, those that"
            " `apt-ray fit` writes now do",
            file=sys.stderr,
        )
    return Watch.of(threshold, settings, pictures=pictures if part == "whole" else ())
