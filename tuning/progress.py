"""Progress that a person can follow in the log of a job, where a redrawn bar is no use."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from apt_ray.tables import align

_SECONDS_BETWEEN_TABLES = 15.0


def say(message: str) -> None:
    """One line of the log, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


class Progress(tune.Callback):
    """Shows a table of the categories now and then, and tells when one has all its trials.

    Args:
        categories: Their names, in the order of the table.
        trials: Trials in each.
        steps: Steps of a whole trial.
        on_ended: Called with category and number of a trial that ended, or failed for good.
    """

    def __init__(
        self,
        categories: Sequence[str],
        trials: int,
        steps: int,
        on_ended: Callable[[str, int], None],
    ) -> None:
        self._rows = {category: _Row(trials, steps) for category in categories}
        self._on_ended = on_ended
        self._last_table = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune writes a pickle that nobody reads."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that runs."""
        self._rows[trial.config["category"]].live.add(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Count a rung."""
        self._rows[trial.config["category"]].count(trial.config["number"], result)
        self._show()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that finished or was stopped early."""
        self._end(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that failed for good."""
        self._end(trial)

    def table(self) -> str:
        """One row a category."""
        header = ("category", "trials", "live", "best", "steps/s", "left")
        return align([header, *((name, *row.cells()) for name, row in self._rows.items())])

    def _end(self, trial: Trial) -> None:
        category, number = trial.config["category"], trial.config["number"]
        row = self._rows[category]
        row.live.discard(number)
        row.ended.add(number)
        self._on_ended(category, number)
        self._show(at_once=len(row.ended) == row.trials)

    def _show(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._last_table > _SECONDS_BETWEEN_TABLES:
            self._last_table = time.monotonic()
            say("\n" + "\n".join(f"    {line}" for line in self.table().splitlines()))


class _Row:
    """One category's progress."""

    def __init__(self, trials: int, steps: int) -> None:
        self.trials, self._steps = trials, steps
        self.live: set[int] = set()
        self.ended: set[int] = set()
        self._reached: dict[int, tuple[int, int]] = {}
        self._best: tuple[int, float, float] | None = None
        self._first: tuple[float, int] | None = None
        self._last = 0.0

    def count(self, number: int, result: dict[str, Any]) -> None:
        self._reached[number] = (result["rung"], result["steps"])
        self._last = time.monotonic()
        # The clock runs from the first report on, since processes take long to start.
        self._first = self._first or (self._last, self._done())
        # Values of different rungs do not compare: the furthest rung counts.
        reached = (result["rung"], result["validation"], -result["validation_sd"])
        self._best = max(self._best or reached, reached)

    def cells(self) -> tuple[str, ...]:
        best = "-" if self._best is None else f"{self._best[1]:.3f} ± {-self._best[2]:.3f}"
        rate, left = "-", "-"
        if self._first is not None and self._last > self._first[0]:
            per_second = (self._done() - self._first[1]) / (self._last - self._first[0])
            rate = f"{per_second:.0f}"
            if per_second > 0:
                left = f"{self._remaining() / per_second:.0f} s"
        trials = f"{len(self.ended)}/{self.trials}"
        return (trials, str(len(self.live)), best, rate, "0 s" if self._is_done() else left)

    def _done(self) -> int:
        return sum(steps for _, steps in self._reached.values())

    def _is_done(self) -> bool:
        return len(self.ended) == self.trials

    def _remaining(self) -> float:
        """Steps to come, if trials to come take as many as those that ended did."""
        ended = [self._reached[n][1] for n in self.ended if n in self._reached]
        expected = sum(ended) / len(ended) if ended else self._steps
        waiting = self.trials - len(self.ended)
        begun = sum(self._reached[n][1] for n in self.live if n in self._reached)
        return max(0.0, waiting * expected - begun)
