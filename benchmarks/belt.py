"""A conveyor belt with known defects, watched: `python -m benchmarks.belt`.

For each seed the washer is learned from a belt of its own: four frames with a good part in the
middle, and `--calibrate` good parts for the threshold, one frame of each. Then another belt passes:
one part in seven is defective, and the belt stands still now and then. An event is right if in one
of its frames the part nearest to the middle is defective, else it is false.

The last table are streams of good parts into which something goes wrong that the detector cannot
see, or that is no defect: frames that are lost, repeated, bent.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from apt_ray.config import FitSettings
from apt_ray.data.folders import GOOD
from apt_ray.data.samples.belt import EMPTY, BeltFrame, draw_belt
from apt_ray.data.samples.products import Washer
from apt_ray.detection.detector import Detector
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.fit import fit
from apt_ray.tables import markdown
from apt_ray.video.changes import small_frame
from apt_ray.video.events import Event
from apt_ray.video.frames import Frame
from apt_ray.video.part import PartView
from apt_ray.video.pseudo import jump, repeat, warp
from apt_ray.video.settings import WatchSettings
from apt_ray.video.watch import Watch, Watched, WatchSummary, watch_frames
from benchmarks.rows import Row, compared, write_rows

_SHOTS = 4
_IN_THE_MIDDLE = 0.06
_LEARNING_SPEED = 0.24
_FEW = 400  # frames, where all of them are inspected
_STOP = 40  # frames for which the belt stands


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What watching a belt came to."""

    defects: int
    found: int
    unseen: int
    false: int
    summary: WatchSummary
    seconds: float
    events: list[Event]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=int, default=70, help="of a belt, 15 frames each (70)")
    parser.add_argument("--calibrate", type=int, default=99, help="good parts (99)")
    parser.add_argument("--rate", type=float, default=0.01, help="false-alarm rate of those (0.01)")
    parser.add_argument("--size", type=int, default=192, help="pixels a side of a frame (192)")
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.24, 0.48])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = load_backbone()
    cases: dict[str, list[Outcome]] = {}
    feeds: dict[str, list[tuple[int, int, int]]] = {}
    for seed in options.seeds:
        own = learn(backbone, seed, options.size, calibrate=0, rate=options.rate)
        told = learn(backbone, seed, options.size, calibrate=options.calibrate, rate=options.rate)
        belts = {
            speed: list(moving_belt(seed, options.parts, options.size, speed))
            for speed in options.speeds
        }
        dense = list(moving_belt(seed, options.parts, options.size, options.speeds[0] / 2, gaps=0))
        usual = belts[options.speeds[0]]
        runs: list[tuple[str, list[BeltFrame], Detector, WatchSettings, bool]] = [
            ("as it is", usual, told, WatchSettings(), True),
            ("without gate", usual, told, WatchSettings(gate=False), True),
            ("one frame is an event", usual, told, WatchSettings(event_frames=1), True),
            ("threshold of the 4 images alone", usual, own, WatchSettings(), True),
            ("every frame inspected", usual[:_FEW], own, WatchSettings(), False),
            ("parts close together", dense, told, WatchSettings(), True),
            *(
                (f"belt at {speed:g} a frame", belts[speed], told, WatchSettings(), True)
                for speed in options.speeds[1:]
            ),
        ]
        for name, belt, detector, settings, whole in runs:
            outcome = watch(belt, detector, settings, whole=whole)
            cases.setdefault(name, []).append(outcome)
            threshold = detector.prompt_set.threshold.value
            print(
                f"{seed} {name}, threshold {threshold:.3f}: {outcome.found} of {outcome.defects},"
                f" {outcome.false} false, {outcome.summary}",
                flush=True,
            )
        for name, found in feed_faults(told, seed, options.size).items():
            feeds.setdefault(name, []).append(found)
    header = (
        *("belt", "events found", "never whole", "false per 1,000 frames", "no forward"),
        "frames/s",
    )
    print(markdown(header, [[name, *_row(outcomes)] for name, outcomes in cases.items()]))
    print(
        markdown(
            ("what goes wrong", "streams", "told as such", "told as an anomaly"),
            [
                [name, *(str(sum(column)) for column in zip(*found, strict=True))]
                for name, found in feeds.items()
            ],
        )
    )
    with_gate, without = cases["as it is"], cases["without gate"]
    rows: list[Row] = [
        compared("forwards", _forwards(with_gate), _forwards(without), "a frame"),
        compared("frames", _pace(with_gate), _pace(without), "1/s", more_is_better=True),
    ]
    write_rows(rows, options.json)


def learn(backbone: Backbone, seed: int, size: int, *, calibrate: int, rate: float) -> Detector:
    """What a belt of good parts teaches."""
    rng = np.random.default_rng(seed)
    support: list[Image.Image] = []
    others: dict[int, list[Image.Image]] = {}
    part_view: PartView | None = None
    places = [GOOD, EMPTY] * (_SHOTS + calibrate)
    for frame in draw_belt(places, seed=1000 + seed, size=size, speed=_LEARNING_SPEED):
        if not frame.parts:
            continue
        part = frame.parts[0]
        if part.number < 2 * _SHOTS:
            if 2 * len(support) == part.number and abs(part.x) <= _IN_THE_MIDDLE:
                support.append(frame.image)
        else:
            part_view = part_view or PartView.of(support)
            # What will be inspected, and nothing else, says where the threshold belongs.
            if part_view is not None and part_view.is_in(small_frame(frame.image)):
                others.setdefault(part.number, []).append(frame.image)
    calibration = [images[rng.integers(len(images))] for images in others.values()]
    with TemporaryDirectory() as name:
        paths = [Path(name) / f"{number:03d}.png" for number in range(_SHOTS + len(calibration))]
        for path, image in zip(paths, (*support, *calibration), strict=True):
            image.save(path)
        prompt_set = fit(
            "washer",
            paths[:_SHOTS],
            FitSettings(false_alarm_rate=rate),
            backbone=backbone,
            calibration=paths[_SHOTS:],
        )
    return Detector(backbone, prompt_set)


def moving_belt(
    seed: int, parts: int, size: int, speed: float, *, gaps: int = 1
) -> Iterator[BeltFrame]:
    """A belt with defects and stops, and so many empty places behind each part."""
    rng = np.random.default_rng(seed)
    kinds = [
        str(rng.choice(Washer.DEFECTS)) if number % 7 == 3 else GOOD for number in range(parts)
    ]
    places = [place for kind in kinds for place in (kind, *[EMPTY] * gaps)]
    stops = dict.fromkeys(range(10 * (1 + gaps), len(places), 25 * (1 + gaps)), _STOP)
    return draw_belt(places, seed=seed, size=size, speed=speed, stops=stops)


def watch(
    belt: Sequence[BeltFrame], detector: Detector, settings: WatchSettings, *, whole: bool
) -> Outcome:
    """Watch a belt."""
    started = time.perf_counter()
    told, events, summary = _watched(
        [frame.image for frame in belt], detector, settings, whole=whole
    )
    seconds = time.perf_counter() - started
    defective = {part.number for frame in belt for part in frame.parts[:1] if part.defect != GOOD}
    seen = {
        part.number
        for frame, watched in zip(belt, told, strict=True)
        for part in frame.parts[:1]
        if watched.score is not None
    }
    found: set[int] = set()
    false = 0
    for event in events:
        if event.kind == "anomaly":
            nearest = {
                part.number
                for frame in belt[event.start : event.end + 1]
                for part in frame.parts[:1]
            }
            found |= nearest & defective
            false += not nearest & defective
    return Outcome(
        defects=len(defective),
        found=len(found),
        unseen=len(defective - seen),
        false=false,
        summary=summary,
        seconds=seconds,
        events=events,
    )


def feed_faults(detector: Detector, seed: int, size: int) -> dict[str, tuple[int, int, int]]:
    """Of streams into which something goes wrong: how many, how many told it as that, and how many
    as an anomaly."""
    places = [GOOD, EMPTY] * 12
    good = [frame.image for frame in draw_belt(places, seed=2000 + seed, size=size, speed=0.24)]
    rng = np.random.default_rng(seed)
    faults: dict[str, tuple[str, Callable[[int], list[Image.Image]]]] = {
        "nothing": ("", lambda at: good),
        "3 frames lost": ("jump", lambda at: jump(good, at, 3)),
        "6 frames lost": ("jump", lambda at: jump(good, at, 6)),
        "15 frames lost, a whole pitch": ("jump", lambda at: jump(good, at, 15)),
        "20 frames frozen": ("frozen", lambda at: repeat(good, at, 20)),
        "8 frames frozen": ("frozen", lambda at: repeat(good, at, 8)),
        "15 frames bent": ("anomaly", lambda at: warp(good, at, 15, seed=seed)),
    }
    found: dict[str, tuple[int, int, int]] = {}
    for name, (kind, fault) in faults.items():
        streams = 1 if not kind else 3
        told = anomalies = 0
        for at in rng.integers(30, len(good) - 40, streams):
            _, events, _ = _watched(fault(int(at)), detector, WatchSettings(), whole=True)
            kinds = {event.kind for event in events}
            told += kind in kinds if kind else bool(kinds)
            anomalies += "anomaly" in kinds
        found[name] = (streams, told, anomalies)
    return found


def _watched(
    images: Sequence[Image.Image], detector: Detector, settings: WatchSettings, *, whole: bool
) -> tuple[list[Watched], list[Event], WatchSummary]:
    learned = detector.prompt_set
    watching = Watch.of(learned.threshold, settings, pictures=learned.thumbnails if whole else ())
    frames = (
        Frame(index=index, time_s=index / 25, load=image.copy) for index, image in enumerate(images)
    )
    told = list(watch_frames(watching, frames, detector.inspect))
    events = [*(event for watched in told for event in watched.events), *watching.finish()]
    return told, [event for event in events if event.is_over], watching.summary


def _row(outcomes: Sequence[Outcome]) -> list[str]:
    frames = sum(outcome.summary.frames for outcome in outcomes)
    return [
        f"{sum(each.found for each in outcomes)} of {sum(each.defects for each in outcomes)}",
        str(sum(each.unseen for each in outcomes)),
        f"{1000 * sum(each.false for each in outcomes) / frames:.2f}"
        f" ({', '.join(str(each.false) for each in outcomes)})",
        f"{1 - _forwards(outcomes):.1%}",
        f"{_pace(outcomes):.0f}",
    ]


def _forwards(outcomes: Sequence[Outcome]) -> float:
    return fmean(each.summary.inspected / each.summary.frames for each in outcomes)


def _pace(outcomes: Sequence[Outcome]) -> float:
    return fmean(each.summary.frames / each.seconds for each in outcomes)


if __name__ == "__main__":
    main()
