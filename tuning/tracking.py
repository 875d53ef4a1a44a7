"""Trials as runs in MLflow, written in batches by a thread of its own."""

import threading
import time
from collections.abc import Sequence

from apt_ray.errors import RegistryError
from apt_ray.registry import LoggedTrial, Registry
from tuning.progress import say
from tuning.records import TrialRecord

_BATCH_S = 10.0


class TrialLog:
    """Takes ended trials and brings them to MLflow, whenever that answers.

    Nothing waits for it. What MLflow did not take stays here, and in the search's store.

    Attributes:
        seconds: Time spent on writing.
        missing: Trials that are not written yet.
    """

    def __init__(self, registry: Registry, search: str) -> None:
        self._registry, self._search = registry, search
        self._waiting: list[TrialRecord] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._is_away = False
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="trial-log", daemon=True)
        self._thread.start()

    @property
    def missing(self) -> int:
        with self._lock:
            return len(self._waiting)

    def add(self, trials: Sequence[TrialRecord]) -> None:
        """Write these with the next batch; those that MLflow has already are left as they are."""
        with self._lock:
            self._waiting += trials

    def close(self, timeout_s: float) -> None:
        """Write what is left, for at most `timeout_s`."""
        self._end.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._end.wait(_BATCH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            batch = list(self._waiting)
        if not batch:
            return
        started = time.monotonic()
        try:
            self._registry.log_trials(self._search, [_logged(trial) for trial in batch])
        except RegistryError as error:
            if not self._is_away:
                say(f"trials are kept until MLflow takes them: {error}")
            self._is_away = True
            return
        finally:
            self.seconds += time.monotonic() - started
        self._is_away = False
        with self._lock:
            self._waiting = self._waiting[len(batch) :]


def _logged(trial: TrialRecord) -> LoggedTrial:
    return LoggedTrial(
        category=trial.category,
        number=trial.number,
        settings=trial.settings,
        metrics={
            name: tuple(zip(trial.steps, getattr(trial, name), strict=True))
            for name in ("validation", "validation_sd", "patch")
        },
        status=trial.status,
    )
