from collections.abc import Iterable

import pytest

from apt_ray.video.events import Event, EventLevels, EventRegion, Events, Seen

LEVELS = EventLevels(begin=0.5, end=0.4, at_once=0.9)
GONE = None  # no whole part in view


def events(scores: Iterable[float | None], **settings: int) -> list[Event]:
    found = Events(LEVELS, **{"frames": 2, "end_frames": 2, **settings})
    told = [
        event
        for index, score in enumerate(scores)
        for event in found.add(
            Seen(index=index, time_s=index / 10, score=score, has_part=score is not GONE)
        )
    ]
    return [*told, *found.finish()]


def spans(scores: Iterable[float | None], **settings: int) -> list[tuple[int, int, int]]:
    return [
        (event.start, event.peak, event.end)
        for event in events(scores, **settings)
        if event.is_over
    ]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.6, 0.7, 0.6, 0.1, 0.1], [(1, 2, 3)]),
        ([0.1, 0.6, 0.1, 0.6, 0.1], []),  # one frame is none
        ([0.1, 0.95, 0.1, 0.1, 0.1], [(1, 1, 1)]),  # unless it is far above
        ([0.6, 0.6, 0.1, 0.6, 0.1, 0.1], [(0, 0, 3)]),  # one low frame ends none
        ([0.6, 0.6, 0.45, 0.45, 0.45, 0.55, 0.1, 0.1], [(0, 0, 5)]),  # between the levels it lasts
        ([0.6, 0.45, 0.6, 0.1], []),  # and before it begins, it needs frames in a row
        ([0.1, 0.5, 0.5], []),  # the threshold itself is not above it
        ([0.6, 0.7], [(0, 1, 1)]),  # what lasts to the end ends there
        ([0.6, 0.7, 0.1, 0.1, 0.8, 0.6, 0.1, 0.1], [(0, 1, 1), (4, 4, 5)]),
    ],
)
def test_an_event_begins_above_the_threshold_and_ends_well_below(
    scores: list[float], expected: list[tuple[int, int, int]]
) -> None:
    assert spans(scores) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([GONE, 0.6, 0.7, GONE, 0.6, 0.8, GONE], [(1, 2, 2), (4, 5, 5)]),  # two parts are two
        ([GONE, 0.6, GONE], [(1, 1, 1)]),  # all frames of a part are enough
        ([GONE, 0.6, 0.1, GONE], []),
        ([GONE, 0.1, 0.6, GONE], []),
        ([GONE, 0.6, GONE, 0.1, GONE], [(1, 1, 1)]),
        ([GONE, 0.6], [(1, 1, 1)]),
    ],
)
def test_an_event_is_of_one_part(
    scores: list[float | None], expected: list[tuple[int, int, int]]
) -> None:
    assert spans(scores) == expected


def test_a_beginning_is_told_at_once_and_the_end_has_its_number() -> None:
    told = events([0.6, 0.6, 0.7, 0.1, 0.1, 0.95, 0.1, 0.1])
    assert [(event.number, event.is_over, event.end) for event in told] == [
        (1, False, 1),
        (1, True, 2),
        (2, False, 5),
        (2, True, 5),
    ]
    assert (told[1].start_s, told[1].peak_s, told[1].end_s, told[1].peak_score) == (
        0.0,
        0.2,
        0.2,
        0.7,
    )


def test_at_most_one_event_comes_of_as_many_frames_above_the_threshold() -> None:
    scores = [0.6 if place % 3 else 0.1 for place in range(300)]
    for frames in (1, 2, 3, 5):
        found = spans(scores, frames=frames, end_frames=1)
        assert len(found) <= sum(score > LEVELS.begin for score in scores) / frames
        assert len(found) == (100 if frames <= 2 else 0)


def test_frames_without_a_score_change_nothing() -> None:
    found = Events(LEVELS, frames=2, end_frames=2)
    told = []
    for index, score in enumerate([0.6, None, 0.6, 0.1, None, 0.1]):
        told += found.add(Seen(index=index, time_s=index, score=score))
    assert [(event.start, event.end) for event in told if event.is_over] == [(0, 2)]


def test_the_evidence_is_that_of_the_peak() -> None:
    found = Events(LEVELS, frames=2, end_frames=1)
    region = EventRegion(x=1, y=2, width=3, height=4, peak=0.8, area=12)
    for index, score in enumerate([0.6, 0.8, 0.7]):
        regions = (region,) if index == 1 else ()
        found.add(Seen(index=index, time_s=0, score=score, regions=regions, evidence=index))
    (event,) = found.add(Seen(index=3, time_s=0, score=0.1, evidence=3))
    assert (event.peak, event.regions, found.evidence) == (1, (region,), 1)


def test_faults_of_the_feed_are_events_of_their_own() -> None:
    found = Events(LEVELS, frames=2, end_frames=2)
    told = []
    for index in range(8):
        told += found.add(
            Seen(index=index, time_s=index, score=0.1, is_frozen=2 <= index < 5, is_jump=index == 6)
        )
    assert [(event.kind, event.is_over, event.start, event.end) for event in told] == [
        ("frozen", False, 2, 2),
        ("frozen", True, 2, 4),
        ("jump", True, 6, 6),
    ]


def test_the_levels_follow_from_the_threshold() -> None:
    levels = EventLevels.of(0.5, [0.1, 0.3, 0.4])
    assert (levels.begin, levels.end, levels.at_once) == pytest.approx((0.5, 0.4, 0.7))
    for scores in ([], [0.5], [0.9]):  # where the threshold does not lie above the good parts
        levels = EventLevels.of(0.5, scores)
        assert levels.end < levels.begin < levels.at_once
