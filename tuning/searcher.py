"""What to try next, in many categories at once: one Optuna study for each."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.encoding import BankState
from tuning.records import TrialRecord
from tuning.settings import RUNGS, SearchSettings
from tuning.space import distributions, starting_point

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class CategoriesSearcher(Searcher):
    """Draws trials of the categories in turn.

    A trial's settings depend on its number and, with Optuna, on the values known by then. Numbers
    that have a record get the settings of the record.

    Args:
        settings: Of the search.
        records: Category -> what an earlier run of the same search has recorded.
        past: Category -> settings that its first trials take, after the starting point.
        bank_state: Category -> whether its trials can start; one that has failed is left out.
        take_in: Called before each draw: finds out what has become of the banks, and may raise to
            end the search. While Ray Tune waits for a draw it does nothing else.
    """

    def __init__(
        self,
        settings: SearchSettings,
        records: Mapping[str, Sequence[TrialRecord]],
        bank_state: Callable[[str], BankState],
        take_in: Callable[[], None] = lambda: None,
        *,
        past: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
    ) -> None:
        super().__init__(metric="validation", mode="max")
        self._settings = settings
        self._bank_state, self._take_in = bank_state, take_in
        self._distributions = distributions(settings.space)
        start = starting_point(settings.space, settings.backbone)
        self._first = {category: (start, *past.get(category, ())) for category in records}
        self._studies = {category: self._study() for category in records}
        self._recorded = {
            category: {record.number: dict(record.settings) for record in known}
            for category, known in records.items()
        }
        self._next = dict.fromkeys(records, 0)
        self._asked: dict[str, tuple[str, optuna.trial.Trial]] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial: its category, number and settings; None where none is ready."""
        self._take_in()
        open_categories = sorted(
            (
                category
                for category, number in self._next.items()
                if number < self._settings.trials and self._bank_state(category) != "failed"
            ),
            key=lambda category: self._next[category],
        )
        if not open_categories:
            return Searcher.FINISHED
        for category in open_categories:
            if self._bank_state(category) == "ready":
                return self._draw(trial_id, category)
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Let Optuna know the value of a rung."""
        if self._settings.objective == "image" and trial_id in self._asked:
            self._asked[trial_id][1].report(result["validation"], result["rung"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Let Optuna know the value of a trial; a trial that was stopped counts as pruned."""
        category, trial = self._asked.pop(trial_id, (None, None))
        if category is None or trial is None:
            return
        study = self._studies[category]
        if not result or "validation" not in result:
            study.tell(trial, state=TrialState.FAIL)
        elif self._settings.objective == "pareto":
            study.tell(trial, [result["validation"], result["patch"]])
        elif result["rung"] < RUNGS:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, result["validation"])

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as `save`: Ray Tune writes a pickle that nobody reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records of the search say it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the records of the search say it all."""

    def _study(self) -> optuna.Study:
        objectives = 2 if self._settings.objective == "pareto" else 1
        return optuna.create_study(directions=[StudyDirection.MAXIMIZE] * objectives)

    def _draw(self, trial_id: str, category: str) -> dict[str, Any]:
        number = self._next[category]
        self._next[category] += 1
        study = self._studies[category]
        point: Mapping[str, Any] | None = self._recorded[category].get(number)
        if point is None and number < len(self._first[category]):
            point = self._first[category][number]
        if point is not None:
            within = {
                name: point[name]
                for name, distribution in self._distributions.items()
                if name in point
                and distribution._contains(distribution.to_internal_repr(point[name]))
            }
            study.enqueue_trial(within)
        study.sampler = self._sampler(number)
        trial = study.ask(fixed_distributions=self._distributions)
        self._asked[trial_id] = (category, trial)
        return {"category": category, "number": number, "settings": dict(trial.params)}

    def _sampler(self, number: int) -> BaseSampler:
        # Seeded by number, so that a resumed search draws what the first one would have drawn.
        seed = 1_000_003 * self._settings.seed + number
        if self._settings.searcher == "random":
            return RandomSampler(seed=seed)
        # The constant liar keeps the trials that run at a time from being the same.
        return TPESampler(seed=seed, constant_liar=True)


class CategoriesScheduler(FIFOScheduler):
    """A scheduler for each category, since values of different categories do not compare."""

    def __init__(self, settings: SearchSettings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = settings.scheduler
        self._schedulers: dict[str, TrialScheduler] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Both are given at once to every category's scheduler."""
        return True

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        self._scheduler(trial).on_trial_add(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        self._scheduler(trial).on_trial_error(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = self._scheduler(trial).on_trial_result(controller, trial, result)
        # The first trial is what all others are held against, to the end.
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        # ASHA wants a value, which a trial that failed at once does not have.
        if "validation" in result:
            self._scheduler(trial).on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        self._scheduler(trial).on_trial_remove(controller, trial)

    def _scheduler(self, trial: Trial) -> TrialScheduler:
        category = trial.config["category"]
        if category not in self._schedulers:
            self._schedulers[category] = (
                FIFOScheduler()  # type: ignore[no-untyped-call]
                if self._kind == "none"
                else ASHAScheduler(
                    time_attr="rung",
                    metric="validation",
                    mode="max",
                    max_t=RUNGS,
                    grace_period=1,
                    reduction_factor=2,
                )
            )
        return self._schedulers[category]
