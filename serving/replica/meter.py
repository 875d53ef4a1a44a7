"""The fleet's Prometheus metrics; Ray's agent on each node exports them.

Serve adds the application, deployment and replica of each. `serving/dashboard.json` shows them in
Grafana.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from ray.serve import metrics

from apt_ray.detection.drift import StreamName

PREFIX = "apt_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SCORES = tuple(step / 20 for step in range(1, 21))
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_WHO = ("category", "version")


class Meter:
    """Counts what a process of the fleet does. `version` is 0 where none answered."""

    def __init__(self) -> None:
        self._requests = _counter("requests", "Images answered, by `outcome`.", (*_WHO, "outcome"))
        self._rejects = _counter("rejects", "Images found anomalous.", _WHO)
        self._loads = _counter("loads", "Prompt sets loaded, by `outcome`.", (*_WHO, "outcome"))
        self._stages = _histogram(
            "stage_seconds", "Time in each `stage` of an image.", _SECONDS, (*_WHO, "stage")
        )
        self._scores = _histogram("anomaly_score", "Anomaly scores.", _SCORES, _WHO)
        self._batches = _histogram("batch_size", "Images of one forward pass.", _BATCHES, ())
        self._history = _counter(
            "history", "Inspections for the history, by `outcome`.", ("category", "outcome")
        )
        self._shadow = _counter(
            "shadow",
            "Images for the `candidate` that is tried beside a version, by `outcome`.",
            (*_WHO, "candidate", "outcome"),
        )
        self._shadow_shift = metrics.Gauge(
            f"{PREFIX}shadow_shift",
            "Mean of the candidate's anomaly scores minus those of the version that serves.",
            tag_keys=_keys((*_WHO, "candidate")),
        )
        self._queue = metrics.Gauge(
            f"{PREFIX}queue", "Images that wait in a replica.", tag_keys=("category",)
        )
        self._drift = metrics.Gauge(
            f"{PREFIX}drift",
            "Evidence that images or scores have drifted, by `stream`; 1 is an alarm.",
            tag_keys=_keys((*_WHO, "stream")),
        )

    def inspected(
        self, category: str, version: int, *, score: float, is_anomalous: bool, ms: dict[str, float]
    ) -> None:
        """An image was inspected; `ms` are the milliseconds of its stages."""
        who = _who(category, version)
        self._requests.inc(tags=who | {"outcome": "ok"})
        if is_anomalous:
            self._rejects.inc(tags=who)
        self._scores.observe(max(score, 1e-9), tags=who)  # Ray refuses to observe 0
        for stage, value in ms.items():
            self._stages.observe(max(value / 1000, 1e-9), tags=who | {"stage": stage})

    def refused(self, category: str, kind: str) -> None:
        """An image was answered with a problem of this kind."""
        self._requests.inc(tags=_who(category, 0) | {"outcome": kind})

    def loaded(self, category: str, version: int, *, succeeded: bool) -> None:
        """A prompt set was loaded and passed its test, or was refused."""
        outcome = "ok" if succeeded else "refused"
        self._loads.inc(tags=_who(category, version) | {"outcome": outcome})

    def kept(self, category: str, outcome: str) -> None:
        """An inspection was kept in the history, dropped for want of time, or could not be."""
        self._history.inc(tags={"category": category, "outcome": outcome})

    def batch(self, size: int) -> None:
        """A forward pass took this many images."""
        self._batches.observe(size)

    def queue(self, category: str, waiting: int) -> None:
        """This many images of the category wait now."""
        self._queue.set(waiting, tags={"category": category})

    def drift(self, category: str, version: int, evidence: Mapping[StreamName, float]) -> None:
        """How near each stream of a category is to an alarm, 0..1."""
        for stream, near in evidence.items():
            self._drift.set(near, tags=_who(category, version) | {"stream": stream})

    def tried(self, category: str, version: int, candidate: int, outcome: str) -> None:
        """A candidate agreed or not on an image of a version, or there was no time for it."""
        who = _who(category, version) | {"candidate": str(candidate)}
        self._shadow.inc(tags=who | {"outcome": outcome})

    def shadow_shift(self, category: str, version: int, candidate: int, mean: float) -> None:
        """By how much a candidate scores higher than a version, in the mean so far."""
        who = _who(category, version) | {"candidate": str(candidate)}
        self._shadow_shift.set(mean, tags=who)


def _who(category: str, version: int) -> dict[str, str]:
    return {"category": category, "version": str(version)}


def _counter(name: str, description: str, tags: Sequence[str]) -> metrics.Counter:
    return metrics.Counter(f"{PREFIX}{name}", description, tag_keys=_keys(tags))


def _histogram(
    name: str, description: str, boundaries: Sequence[float], tags: Sequence[str]
) -> metrics.Histogram:
    return metrics.Histogram(
        f"{PREFIX}{name}", description, boundaries=list(boundaries), tag_keys=_keys(tags)
    )


def _keys(tags: Sequence[str]) -> tuple[str]:
    return cast("tuple[str]", tuple(tags))  # Ray's annotation says one, its code takes any number
