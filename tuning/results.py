"""What a search found: the trials of a category, which of them won, and tables of both."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from ray.tune import Result, ResultGrid

from apt_ray.prompt_set import PromptSet
from apt_ray.registry import RegisteredVersion
from tuning.space import SEARCHED


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial: its searched settings and what it reported, rung by rung.

    Attributes:
        number: Place in the order of drawing, from 0.
        settings: Searched setting -> value.
        steps: Optimisation steps done at each rung.
        held_out: Held-out value (AUROC, 0..1) at each rung.
        held_out_sd: Its standard deviation over support seeds and folds.
        families: Held-out value of each perturbation family at the last rung.
        error: Why it failed, if it did.
    """

    number: int
    settings: Mapping[str, Any]
    steps: tuple[int, ...]
    held_out: tuple[float, ...]
    held_out_sd: tuple[float, ...]
    families: Mapping[str, float]
    error: Exception | None

    def metrics(self) -> dict[str, float]:
        """Its last held-out value, by the names under which a prompt set keeps it."""
        return {
            "held_out": self.held_out[-1],
            "held_out_sd": self.held_out_sd[-1],
            **{f"held_out.{family}": value for family, value in self.families.items()},
        }

    def row(self, last_step: int) -> dict[str, object]:
        """A row of the trial table; `last_step` is where a trial that was not stopped ends."""
        if self.error is not None:
            status = "failed"
        else:
            status = "finished" if self.steps[-1:] == (last_step,) else "stopped early"
        return {
            "trial": self.number,
            **{name: self.settings[name] for name in SEARCHED},
            "held_out": self.held_out[-1] if self.held_out else None,
            "held_out_sd": self.held_out_sd[-1] if self.held_out_sd else None,
            "steps": self.steps[-1] if self.steps else 0,
            "status": status,
        }


def read_trials(results: ResultGrid) -> list[TrialRecord]:
    """The trials of a finished Ray Tune experiment, in the order in which they were drawn."""
    return [_read_trial(number, results[number]) for number in range(len(results))]


def choose_winner(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The best held-out value among the trials that went furthest; of equals, the least spread.

    A trial that was stopped early has a value of fewer steps, which compares with none of a later
    rung; at its own rung it was behind already. If no trial reported, the first error is raised.
    """
    furthest = max(len(trial.steps) for trial in trials)
    if furthest == 0:
        raise next(trial.error for trial in trials if trial.error is not None)
    contenders = [trial for trial in trials if len(trial.steps) == furthest]
    return max(
        contenders, key=lambda trial: (_or_worst(trial.held_out[-1]), -trial.held_out_sd[-1])
    )


def draw_trials(trials: Sequence[TrialRecord], winner: TrialRecord) -> Image.Image:
    """Held-out value against steps, a line a trial; the winner with its standard deviation."""
    figure = Figure(figsize=(7.6, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for trial in trials:
        if trial is not winner:
            axes.plot(trial.steps, trial.held_out, color="0.65", linewidth=1, marker=".")
    axes.errorbar(
        winner.steps,
        winner.held_out,
        yerr=winner.held_out_sd,
        color="tab:blue",
        linewidth=2,
        capsize=3,
        marker="o",
        label=f"trial {winner.number}, chosen",
    )
    axes.set(xlabel="steps", ylabel="held-out value (AUROC)")
    axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedCategory:
    """A category whose winner is registered."""

    trials: Sequence[TrialRecord]
    winner: TrialRecord
    prompt_set: PromptSet
    version: RegisteredVersion
    seconds: Mapping[str, float]

    def summary(self) -> dict[str, object]:
        """The category's part of the summary, ready for JSON."""
        threshold, settings = self.prompt_set.threshold, self.prompt_set.settings
        return {
            "category": self.version.category,
            "status": "registered",
            "version": self.version.version,
            "aliases": list(self.version.aliases),
            "settings": settings.model_dump(),
            "metrics": self.prompt_set.metrics,
            "threshold": threshold.value,
            "certified_false_alarm_rate": threshold.certified_false_alarm_rate,
            "support_hash": self.prompt_set.support_hash,
            "trials": [trial.row(settings.steps) for trial in self.trials],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


def closing_table(tuned: Sequence[TunedCategory]) -> str:
    """One line a category: the best settings and what came of them."""
    header = ("category", "context", "noise", "smgs", "rate", "held-out", "threshold", "certified")
    rows = [(*header, "version", "seconds")]
    for category in tuned:
        settings, threshold = category.prompt_set.settings, category.prompt_set.threshold
        rate = threshold.certified_false_alarm_rate
        rows.append(
            (
                category.version.category,
                str(settings.context_length),
                f"{settings.noise_strength:g}",
                f"{settings.smgs_weight:.2f}",
                f"{settings.learning_rate:.4f}",
                f"{category.winner.held_out[-1]:.3f} ± {category.winner.held_out_sd[-1]:.3f}",
                f"{threshold.value:.3f}",
                "no" if rate is None else f"at {rate:g}",
                str(category.version.version),
                f"{sum(category.seconds.values()):.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _read_trial(number: int, result: Result) -> TrialRecord:
    frame = result.metrics_dataframe
    reports = [] if frame is None else frame.to_dict("records")
    return TrialRecord(
        number=number,
        settings=result.config or {},
        steps=tuple(report["steps"] for report in reports),
        held_out=tuple(report["held_out"] for report in reports),
        held_out_sd=tuple(report["held_out_sd"] for report in reports),
        families=(result.metrics or {}).get("families", {}),
        error=result.error,
    )


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
