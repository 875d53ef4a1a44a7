"""What a search found: which trial of a category won, by how much, and what mattered."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import AptError, DataError
from apt_ray.registry import RegisteredVersion
from tuning.records import TrialRecord
from tuning.space import Space, distributions

MIN_STANDARD_ERRORS = 2.0
"""By so many a winner must be better than the settings that hold without a search."""

_FEWEST_FOR_IMPORTANCE = 4

_FEWEST_IMAGES = 3  # fewer differences tell nothing of their error


def choose_winner(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial whose settings are to be fitted: the best one, if it is better than the first by
    more than chance, and else the first."""
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
        """Whether it is more than chance: above `MIN_STANDARD_ERRORS` of its errors."""
        return self.mean > MIN_STANDARD_ERRORS * self.error

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


def importances(trials: Sequence[TrialRecord], space: Space) -> dict[str, float]:
    """Share of each searched setting in the variance of the value (fANOVA), greatest first.

    Values are those of the furthest rung that half of the trials have reached. Empty where there
    are too few trials to say.
    """
    import optuna

    reached = sorted((len(trial.steps) for trial in trials if trial.steps), reverse=True)
    if len(reached) < _FEWEST_FOR_IMPORTANCE:
        return {}
    rung = reached[(len(reached) - 1) // 2]
    study = optuna.create_study(direction="maximize")
    known = distributions(space)
    for trial in trials:
        if len(trial.steps) >= rung and math.isfinite(trial.validation[rung - 1]):
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.settings, distributions=known, value=trial.validation[rung - 1]
                )
            )
    if len({trial.value for trial in study.trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedCategory:
    """A category whose winner is registered.

    Attributes:
        trials: All of its trials, in the order of drawing.
        winner: The trial whose settings the prompt set was fitted with.
        verdict: What the search found, in a sentence.
        importances: Searched setting -> share in the variance of the value; may be empty.
        prompt_set: The fit on all shots.
        version: What the registry made of it.
        seconds: "search" (since its start), "fit" and "register", by the clock.
    """

    trials: Sequence[TrialRecord]
    winner: TrialRecord
    verdict: str
    importances: Mapping[str, float]
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
            "importances": dict(self.importances),
            "threshold": threshold.value,
            "certified_false_alarm_rate": threshold.certified_false_alarm_rate,
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
    return f"the search found nothing better than the defaults: the best trial is {gain} ahead"


def _no_result(trials: Sequence[TrialRecord]) -> AptError:
    errors = [trial.error for trial in trials if trial.error is not None]
    return DataError(errors[0] if errors else "no trial has reported yet: --resume the search")


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
