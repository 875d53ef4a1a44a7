"""What a search found: which trial of a category won, by how much, and what mattered."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import AptError, DataError
from apt_ray.registry import RegisteredVersion
from tuning.records import TrialRecord
from tuning.space import Space, distributions

MIN_GAIN = 0.03
"""By so much of validation value a winner must be better than the settings that hold without a
search: smaller gains on self-generated anomalies are not found again on real ones
(`benchmarks.search_worth`)."""

MIN_STANDARD_ERRORS = 4.0
"""And by so many of its errors, which know the judged images only, not what real defects are."""

_FEWEST_FOR_IMPORTANCE = 4

_TREES, _RESAMPLED_TREES = 64, 8

_RESAMPLED = 40
"""Draws behind an interval of importances."""

_FEWEST_IMAGES = 3  # fewer differences tell nothing of their error


def choose_winner(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial whose settings are to be fitted: the best one if it is so far ahead of the first
    that real defects may bear it out, and else the first."""
    best = best_trial(trials)
    gain = gain_over_first(trials, best)
    if gain is None or gain.is_seen:
        return best
    return next(trial for trial in trials if trial.number == 0)


def best_trial(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The best validation value among the trials that went furthest; of equals, the least spread.

    A trial that was stopped early has a value of fewer steps, which compares with none of a later
    rung; at its own rung it was behind already. DataError if no trial reported.
    """
    furthest = max((len(trial.steps) for trial in trials), default=0)
    if furthest == 0:
        raise _no_result(trials)
    contenders = [trial for trial in trials if len(trial.steps) == furthest]
    return max(
        contenders, key=lambda trial: (_or_worst(trial.validation[-1]), -trial.validation_sd[-1])
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """How much better than the first trial, whose settings hold without a search, another is.

    Attributes:
        mean: Of the validation value, over the judged images.
        error: Standard error of that mean, of paired differences.
    """

    mean: float
    error: float

    @property
    def is_seen(self) -> bool:
        """Whether real defects may bear it out."""
        return self.mean > max(MIN_GAIN, MIN_STANDARD_ERRORS * self.error)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f} points"


def gain_over_first(trials: Sequence[TrialRecord], trial: TrialRecord) -> Gain | None:
    """The gain of a trial; None where the first has not come as far, or cannot be compared."""
    first = next((one for one in trials if one.number == 0), None)
    if first is None or len(first.steps) != len(trial.steps) or len(first.images) < _FEWEST_IMAGES:
        return None
    pairs = zip(trial.images, first.images, strict=True)
    differences = [after - before for after, before in pairs]
    error = stdev(differences) / math.sqrt(len(differences))
    return Gain(mean=fmean(differences), error=error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """How much a searched setting matters: shares in the variance of the value, 0..1.

    Attributes:
        share: Of all trials (fANOVA).
        low: 5th percentile over trials drawn with replacement.
        high: 95th percentile.
        by_chance: 95th percentile where the values are dealt out to the trials at random.
    """

    share: float
    low: float
    high: float
    by_chance: float

    @property
    def is_seen(self) -> bool:
        """Whether it is more than chance gives."""
        return self.share > self.by_chance

    def __str__(self) -> str:
        interval = f"{self.share:.0%} ({self.low:.0%} to {self.high:.0%})"
        return interval if self.is_seen else f"{interval}, no difference seen"


def importances(trials: Sequence[TrialRecord], space: Space) -> dict[str, Importance]:
    """How much each searched setting matters, greatest first.

    Values are those of the furthest rung that half of the trials have reached. Empty where there
    are too few trials to say, or all have the same value.
    """
    reached = sorted((len(trial.steps) for trial in trials if trial.steps), reverse=True)
    if len(reached) < _FEWEST_FOR_IMPORTANCE:
        return {}
    rung = reached[(len(reached) - 1) // 2]
    known = [
        (trial.settings, trial.validation[rung - 1])
        for trial in trials
        if len(trial.steps) >= rung and math.isfinite(trial.validation[rung - 1])
    ]
    values = [value for _, value in known]
    shares = _shares(known, space, seed=0, trees=_TREES)
    if not shares:
        return {}
    rng = random.Random(0)
    resampled, dealt = [], []
    for seed in range(_RESAMPLED):
        drawn = rng.choices(known, k=len(known))
        resampled.append(_shares(drawn, space, seed=seed))
        shuffled = rng.sample(values, k=len(values))
        settings = [one for one, _ in known]
        dealt.append(_shares(list(zip(settings, shuffled, strict=True)), space, seed=seed))
    found = {}
    for name, share in shares.items():
        by_trials = [one.get(name, 0.0) for one in resampled]
        by_chance = [one.get(name, 0.0) for one in dealt]
        found[name] = Importance(
            share=share,
            low=_quantile(by_trials, 0.05),
            high=_quantile(by_trials, 0.95),
            by_chance=_quantile(by_chance, 0.95),
        )
    return found


def _shares(
    known: Sequence[tuple[Mapping[str, Any], float]],
    space: Space,
    *,
    seed: int,
    trees: int = _RESAMPLED_TREES,
) -> dict[str, float]:
    """fANOVA of settings and values; empty where the values say nothing."""
    import optuna

    ranges = distributions(space)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=dict(settings), distributions=ranges, value=value)
            for settings, value in known
        ]
    )
    if len({value for _, value in known}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except RuntimeError:  # no tree has found a difference
            return {}


def _quantile(values: Sequence[float], level: float) -> float:
    return sorted(values)[round(level * (len(values) - 1))]


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedCategory:
    """A category whose winner is registered.

    Attributes:
        trials: All of its trials, in the order of drawing.
        winner: The trial whose settings the prompt set was fitted with.
        verdict: What the search found, in a sentence.
        importances: Searched setting -> how much it matters; may be empty.
        prompt_set: The fit on all shots.
        version: What the registry made of it.
        seconds: "search" (since its start), "fit" and "register", by the clock.
    """

    trials: Sequence[TrialRecord]
    winner: TrialRecord
    verdict: str
    importances: Mapping[str, Importance]
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
            "verdict": self.verdict,
            "settings": settings.model_dump(),
            "backbone": self.prompt_set.backbone.model_dump(mode="json"),
            "metrics": self.prompt_set.metrics,
            "importances": {name: asdict(one) for name, one in self.importances.items()},
            "threshold": threshold.value,
            "certified_false_alarm_rate": threshold.certified_false_alarm_rate,
            "copies": self.prompt_set.provenance.copies,
            "support_hash": self.prompt_set.support_hash,
            "trials": [trial.row() for trial in self.trials],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


def say_what_was_found(trials: Sequence[TrialRecord]) -> str:
    """Whether the search found anything better than the settings that hold without one."""
    best = best_trial(trials)
    gain = gain_over_first(trials, best)
    if best.number == 0:
        return "the search found nothing better than the defaults"
    if gain is None:
        return "the defaults have not come as far as the winner, or too few images judge them"
    if gain.is_seen:
        return f"the winner is better than the defaults by {gain} of validation value"
    return (
        f"the search found nothing that is far better than the defaults: the best trial is {gain}"
        " ahead"
    )


def _no_result(trials: Sequence[TrialRecord]) -> AptError:
    errors = [trial.error for trial in trials if trial.error is not None]
    return DataError(errors[0] if errors else "no trial has reported yet: --resume the search")


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
