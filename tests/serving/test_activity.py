"""The last hour of a category: counted by the minute in replicas, summed by the controller."""

import numpy as np
import pytest

from serving.controller.activity import Activity, summed
from serving.replica.last_hour import LastHour


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def counted(*milliseconds: float, score: float = 0.3, is_anomalous: bool = False) -> LastHour:
    hour = LastHour()
    for ms in milliseconds:
        hour.add("nut", score=score, is_anomalous=is_anomalous, ms=ms)
    return hour


def of_nut(*hours: LastHour) -> Activity:
    activity = summed([hour.counts()["nut"] for hour in hours])
    assert activity is not None
    return activity


def test_images_leave_the_hour_minute_by_minute() -> None:
    clock = Clock()
    hour = LastHour(clock)
    for minute in range(90):
        clock.now = 5000.0 + 60 * minute
        hour.add("nut", score=0.3, is_anomalous=minute % 2 == 0, ms=10)
        if minute == 0:
            hour.add("bolt", score=0.3, is_anomalous=False, ms=10)
        assert of_nut(hour).inspected == min(minute + 1, 60)
        assert ("bolt" in hour.counts()) is (minute < 60)
    assert of_nut(hour).rejected == 30
    clock.now += 59 * 60
    assert of_nut(hour).inspected == 1
    clock.now += 60
    assert hour.counts() == {}
    assert summed([]) is None


def test_scores_are_counted_in_twenty_bins() -> None:
    hour = LastHour()
    for score in (0.0, 0.0499, 0.05, 0.5, 0.999, 1.0):
        hour.add("nut", score=score, is_anomalous=False, ms=1)
    scores = of_nut(hour).scores
    assert len(scores) == 20
    assert {bin_: count for bin_, count in enumerate(scores) if count} == {0: 2, 1: 1, 10: 1, 19: 2}


def test_replicas_add_up_to_the_percentiles_of_all() -> None:
    rng = np.random.default_rng(0)
    fast, slow = rng.lognormal(np.log(12), 0.3, 4000), rng.lognormal(np.log(300), 0.5, 1000)
    both = of_nut(counted(*fast), counted(*slow, is_anomalous=True))
    assert (both.inspected, both.rejected) == (5000, 1000)
    everything = np.concatenate([fast, slow])
    for found, q in ((both.latency_ms_p50, 50), (both.latency_ms_p95, 95)):
        assert found == pytest.approx(np.percentile(everything, q), rel=0.1)


@pytest.mark.parametrize("ms", [0.0, 0.4, 1.0, 3.0, 250.0, 30_000.0, 1e7])
def test_a_lone_image_is_its_own_median(ms: float) -> None:
    median = of_nut(counted(ms)).latency_ms_p50
    assert median == pytest.approx(np.clip(ms, 0.9, 5e4), rel=0.1)
