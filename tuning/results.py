"""What a search found: which trial of a category won, and what mattered."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import AptError, DataError
from apt_ray.registry import RegisteredVersion
from tuning.records import TrialRecord
from tuning.space import Space, distributions

_FEWEST_FOR_IMPORTANCE = 4


def choose_winner(trials: Sequence[TrialRecord]) -> TrialRecord:
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
        importances: Searched setting -> share in the variance of the value; may be empty.
        prompt_set: The fit on all shots.
        version: What the registry made of it.
        seconds: "search" (since its start), "fit" and "register", by the clock.
    """

    trials: Sequence[TrialRecord]
    winner: TrialRecord
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
            "settings": settings.model_dump(),
            "metrics": self.prompt_set.metrics,
            "importances": dict(self.importances),
            "threshold": threshold.value,
            "certified_false_alarm_rate": threshold.certified_false_alarm_rate,
            "copies": self.prompt_set.provenance.copies,
            "support_hash": self.prompt_set.support_hash,
            "trials": [trial.row() for trial in self.trials],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


def _no_result(trials: Sequence[TrialRecord]) -> AptError:
    errors = [trial.error for trial in trials if trial.error is not None]
    return DataError(errors[0] if errors else "no trial has reported yet: --resume the search")


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
