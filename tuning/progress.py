"""Progress that a person can follow in the log of a job, where a redrawn bar is no use."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from apt_ray.errors import WriteError
from apt_ray.files import write_json
from apt_ray.tables import align

_SECONDS_BETWEEN_TABLES = 15.0
_SECONDS_BETWEEN_FILES = 1.0


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
        file: Where it is written as JSON too, for programs; None for nowhere.
    """

    def __init__(
        self,
        categories: Sequence[str],
        trials: int,
        steps: int,
        on_ended: Callable[[str, int], None],
        file: Path | None = None,
    ) -> None:
        self._file, self._last_written = file, -math.inf
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
        self.write()

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
        self.write(at_once=len(row.ended) == row.trials)

    def write(self, *, at_once: bool = False) -> None:
        """Write the file, now or if some time has passed; a full disk costs the file alone."""
        if self._file is None or not (
            at_once or time.monotonic() - self._last_written > _SECONDS_BETWEEN_FILES
        ):
            return
        self._last_written = time.monotonic()
        content = {name: row.summary() for name, row in self._rows.items()}
        with suppress(WriteError):
            write_json(self._file, {"categories": content})

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
        rate, left = self._rate(), self._left_s()
        return (
            f"{len(self.ended)}/{self.trials}",
            str(len(self.live)),
            best,
            "-" if rate is None else f"{rate:.0f}",
            "-" if left is None else f"{left:.0f} s",
        )

    def summary(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "trials": self.trials,
            "ended": len(self.ended),
            "live": len(self.live),
            "best": None if self._best is None else self._best[1],
            "best_sd": None if self._best is None else -self._best[2],
            "left_s": self._left_s(),
        }

    def _rate(self) -> float | None:
        """Steps a second."""
        if self._first is None or self._last <= self._first[0]:
            return None
        return (self._done() - self._first[1]) / (self._last - self._first[0])

    def _left_s(self) -> float | None:
        if len(self.ended) == self.trials:
            return 0.0
        rate = self._rate()
        return self._remaining() / rate if rate else None

    def _done(self) -> int:
        return sum(steps for _, steps in self._reached.values())

    def _remaining(self) -> float:
        """Steps to come, if trials to come take as many as those that ended did."""
        ended = [self._reached[n][1] for n in self.ended if n in self._reached]
        expected = sum(ended) / len(ended) if ended else self._steps
        waiting = self.trials - len(self.ended)
        begun = sum(self._reached[n][1] for n in self.live if n in self._reached)
        return max(0.0, waiting * expected - begun)
