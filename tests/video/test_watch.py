from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apt_ray.data.samples.belt import draw_belt
from apt_ray.errors import ImageError
from apt_ray.video.events import Event, EventLevels
from apt_ray.video.frames import Frame
from apt_ray.video.part import PartView
from apt_ray.video.pseudo import jump, repeat, warp
from apt_ray.video.settings import WatchSettings
from apt_ray.video.watch import Watch, Watched, watch_frames

LEVELS = EventLevels(begin=0.5, end=0.4, at_once=0.99)
SIZE = 96


@dataclass(frozen=True)
class Score:
    anomaly_score: float
    regions: Sequence[Any] = ()


class Detector:
    """Finds rust alone, by its colour, and counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def inspect(self, images: list[Image.Image]) -> list[Score]:
        self.batches.append(len(images))
        return [Score(0.8 if self._rust(image) > 20 else 0.2) for image in images]

    @staticmethod
    def _rust(image: Image.Image) -> int:
        red, _, blue = np.moveaxis(np.asarray(image).astype(int), -1, 0)
        return int((red - blue > 50).sum())


def frames(images: Sequence[Image.Image]) -> list[Frame]:
    return [
        Frame(index=index, time_s=index / 25, load=image.copy) for index, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def belt() -> list[Any]:
    """Rust on the places 2 and 5; the belt stands still when the last of them is in the middle."""
    kinds = ["good", "good", "rust", "good", "", "rust", "good", "good"]
    return list(draw_belt(kinds, seed=1, size=SIZE, stops={5: 30}))


@pytest.fixture(scope="module")
def part() -> PartView:
    shown = draw_belt(["good"] * 3, seed=2, size=SIZE)
    view = PartView.of([frame.image for frame in shown if abs(frame.parts[0].x) < 0.06])
    assert view is not None
    return view


def run(
    images: Sequence[Image.Image], part: PartView | None = None, **settings: Any
) -> tuple[list[Watched], list[Event], Watch, Detector]:
    watch, detector = Watch(LEVELS, WatchSettings.parse(settings), part=part), Detector()
    told = list(watch_frames(watch, frames(images), detector.inspect, batch=4))
    events = [*(event for watched in told for event in watched.events), *watch.finish()]
    return told, [event for event in events if event.is_over], watch, detector


def test_each_defective_part_is_an_event_of_its_own(belt: list[Any], part: PartView) -> None:
    told, events, watch, detector = run([frame.image for frame in belt], part)
    assert [event.kind for event in events] == ["anomaly", "anomaly"]
    assert [belt[event.peak].parts[0].number for event in events] == [2, 5]
    assert events[1].end - events[1].start >= 30
    summary = watch.summary
    assert summary.frames == len(belt) == len(told)
    assert [watched.index for watched in told] == list(range(len(belt)))
    assert sum(detector.batches) == summary.inspected
    assert max(detector.batches) <= 4
    assert summary.inspected + summary.unchanged + summary.no_part == summary.frames
    assert (summary.anomalies, summary.frozen, summary.jumps) == (2, 0, 0)


def test_frames_that_stay_as_they_are_cost_nothing_and_change_no_event(
    belt: list[Any], part: PartView
) -> None:
    images = [frame.image for frame in belt]
    _, with_gate, watch, detector = run(images, part)
    _, without, other, every = run(images, part, gate=False)
    assert with_gate == without
    assert other.summary.unchanged == 0
    assert watch.summary.unchanged >= 28  # of the 30 for which the belt stood
    assert sum(every.batches) - sum(detector.batches) == watch.summary.unchanged


def test_an_unchanged_frame_has_the_score_of_the_frame_before(
    belt: list[Any], part: PartView
) -> None:
    told, *_ = run([frame.image for frame in belt], part)
    scores = {watched.score for watched in told if watched.verdict == "unchanged"}
    assert scores == {0.8}
    assert {watched.score for watched in told if watched.verdict == "no part"} == {None}


def test_without_a_view_of_the_part_every_frame_is_inspected(belt: list[Any]) -> None:
    _, _, watch, _ = run([frame.image for frame in belt[:40]], None, gate=False)
    assert watch.summary.inspected == 40


def test_a_stream_in_which_nothing_was_inspected_says_so(part: PartView) -> None:
    _, _, watch, _ = run([Image.new("RGB", (SIZE, SIZE), (30, 32, 34))] * 3, part)
    assert "--part any" in watch.summary.advice
    assert run([Image.new("RGB", (SIZE, SIZE))] * 3)[2].summary.advice == ""


def test_a_damaged_frame_is_told_and_ends_nothing(belt: list[Any], part: PartView) -> None:
    def damaged() -> Image.Image:
        raise ImageError("frame 30 is damaged: save it again")

    given = frames([frame.image for frame in belt])
    place = next(i for i, frame in enumerate(belt) if frame.parts[0].number == 5)
    given[place + 15] = Frame(index=place + 15, time_s=0, load=damaged)
    watch = Watch(LEVELS, WatchSettings(), part=part)
    told = list(watch_frames(watch, given, Detector().inspect))
    assert [watched.error for watched in told if watched.verdict == "damaged"] == [
        "frame 30 is damaged: save it again"
    ]
    watch.finish()
    assert (watch.summary.damaged, watch.summary.anomalies) == (1, 2)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda images: jump(images, 60, 6), [("jump", 60)]),
        # The belt has gone on when the camera wakes up.
        (lambda images: repeat(images, 60, 20), [("frozen", 70), ("jump", 81)]),
        (lambda images: images, []),
    ],
)
def test_a_feed_that_is_not_what_it_was_is_told(
    part: PartView, fault: Any, expected: list[tuple[str, int]]
) -> None:
    good = [frame.image for frame in draw_belt(["good"] * 8, seed=3, size=SIZE)]
    _, events, _, _ = run(fault(good), part)
    assert sorted((event.kind, event.start) for event in events) == expected
    _, events, _, _ = run(fault(good), part, jumps=False, frozen_frames=0)
    assert events == []


def test_pseudo_anomalies_change_the_frames_that_they_name() -> None:
    good = [Image.effect_noise((32, 32), 80).convert("RGB") for _ in range(10)]
    assert jump(good, 3, 2) == [*good[:3], *good[5:]]
    assert repeat(good, 3, 2) == [*good[:4], good[3], good[3], *good[6:]]
    bent = warp(good, 3, 2)
    assert [place for place in range(10) if bent[place] != good[place]] == [3, 4]
    assert warp(good, 3, 2)[3] == bent[3] != warp(good, 3, 2, seed=1)[3]
