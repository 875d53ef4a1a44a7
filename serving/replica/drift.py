"""What a replica says of drift: it watches the live images of each category."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt_ray.detection.drift import Appearance, DriftSettings, DriftWatch
from serving.controller.drift import DriftReport, DriftReset
from serving.controller.orders import Order
from serving.replica.meter import Meter
from serving.replica.served import ServedCategory


@dataclass(frozen=True, slots=True)
class _Watched:
    """A category's images so far.

    Attributes:
        served: how they were inspected; only by the same version and region do scores compare.
    """

    served: Order
    watch: DriftWatch


class DriftWatches:
    """A watch for each category that is inspected; of one thread.

    It begins anew with each version, and with each replica.

    Args:
        settings: how long each learns, and when it alarms.
        meter: shows the evidence; None where nothing does.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: DriftSettings,
        *,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._meter = meter
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._resets: dict[str, str] = {}

    def add(
        self,
        served: ServedCategory,
        *,
        score: float,
        appearance: Appearance,
        features_W: NDArray[np.float32],
    ) -> None:
        """An image was inspected by the version that serves."""
        category, order = served.about.category, served.order
        watched = self._watched.get(category)
        if watched is None or not _compares(watched.served, order):
            self.forget(category)
            watched = _Watched(order, DriftWatch(self._settings, calibration=_calibration(served)))
            self._watched[category] = watched
        watched.watch.add(
            score=score, appearance=appearance, features_W=features_W, at=self._clock()
        )

    def forget(self, category: str) -> None:
        """A category is served no more, or by another version."""
        watched = self._watched.pop(category, None)
        if watched and self._meter and watched.served.version is not None:
            silent = dict.fromkeys(watched.watch.evidence(), 0.0)
            self._meter.drift(category, watched.served.version, silent)

    def reset(self, resets: Mapping[str, DriftReset]) -> None:
        """Do what operators asked for, each of it once."""
        for category, reset in resets.items():
            if self._resets.get(category) != reset.id:
                self._resets[category] = reset.id
                if watched := self._watched.get(category):
                    watched.watch.reset(anew=reset.anew)

    def reports(self) -> dict[str, DriftReport]:
        """For each category with traffic since its version came."""
        reports = {}
        for category, watched in self._watched.items():
            version, watch = watched.served.version, watched.watch
            if version is None:
                continue
            if self._meter:
                self._meter.drift(category, version, watch.evidence())
            reports[category] = DriftReport(
                version=version,
                learning=watch.learning,
                alarms=watch.alarms,
                reset=self._resets.get(category, ""),
            )
        return reports


def _compares(one: Order, other: Order) -> bool:
    """Whether both score an image alike, whatever they then decide."""
    return (one.version, one.region_of_interest) == (other.version, other.region_of_interest)


def _calibration(served: ServedCategory) -> tuple[float, ...]:
    """The scores that good parts repeat: those of calibration images, of the whole image."""
    threshold = served.detector.prompt_set.threshold
    if threshold.source != "calibration images" or served.order.region_of_interest is not None:
        return ()
    return tuple(threshold.scores)
