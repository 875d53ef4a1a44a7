"""Progress that a person can follow in the log of a job, where a redrawn bar is no use."""

import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from tuning.settings import RUNGS

_MOST_SECONDS_BETWEEN_LINES = 20.0


def say(message: str) -> None:
    """One line of the log, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


class Progress(tune.Callback):
    """Says how far the trials of one category are: after each trial, and between slow ones."""

    def __init__(self, label: str, trials: int) -> None:
        self._label = label
        self._trials = trials
        self._rungs: dict[str, int] = {}
        self._ended: set[str] = set()
        self._best: tuple[int, float, float] | None = None
        self._last_line = time.monotonic()
        self._first_report: float | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Count a rung."""
        self._rungs[trial.trial_id] = result["rung"]
        self._first_report = self._first_report or time.monotonic()
        # Values of different rungs do not compare: the furthest rung counts.
        reached = (result["rung"], result["held_out"], -result["held_out_sd"])
        self._best = max(self._best or reached, reached)
        if time.monotonic() - self._last_line > _MOST_SECONDS_BETWEEN_LINES:
            self._say()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that finished or was stopped early."""
        self._end(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that failed."""
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        self._ended.add(trial.trial_id)
        self._rungs[trial.trial_id] = RUNGS
        self._say()

    def _say(self) -> None:
        self._last_line = time.monotonic()
        line = f"{self._label}: {len(self._ended)} of {self._trials} trials"
        if self._best is not None:
            _, value, negative_sd = self._best
            line += f", best {value:.3f} ± {-negative_sd:.3f}"
        # The clock runs from the first report on, since worker processes take long to start.
        rungs = sum(self._rungs.values())
        if self._first_report is not None and rungs > 1:
            a_rung = (self._last_line - self._first_report) / (rungs - 1)
            line += f", about {a_rung * (RUNGS * self._trials - rungs):.0f} s left"
        say(line)
