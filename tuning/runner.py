"""The search over categories: Ray Tune for each, then the fit and the registration of its winner.

Categories are searched one after another. While one is searched, the support sets of the next are
encoded, and the winner of the one before is fitted and registered.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import ObjectRef, tune
from ray.exceptions import RayTaskError
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from apt_ray.bank import SupportBank
from apt_ray.data.folders import Category
from apt_ray.errors import AptError
from apt_ray.registry import Registry, default_pending
from tuning.progress import Progress, say
from tuning.results import (
    TrialRecord,
    TunedCategory,
    choose_winner,
    draw_trials,
    read_trials,
)
from tuning.settings import RUNGS, SearchSettings
from tuning.space import search_space, starting_point
from tuning.trial import Banks, TrialPlan, encode_bank, fit_winner, run_trial


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoding:
    """The banks of a category on their way; `shots` is small, and raises what went wrong."""

    banks: Banks
    shots: "tuple[ObjectRef[int], ...]"


class Search:
    """The search over some categories on a connected Ray.

    Attributes:
        tuned: What was registered so far.
        failures: Category -> why it was not.
    """

    def __init__(
        self, settings: SearchSettings, registry: Registry, provenance: dict[str, str]
    ) -> None:
        self.tuned: list[TunedCategory] = []
        self.failures: dict[str, str] = {}
        self._settings = settings
        self._registry = registry
        self._provenance = provenance
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        nodes = [node["Resources"].get("CPU", 0) for node in alive]
        self._live_trials = settings.live_trials or max(1, int(sum(nodes)))
        if max(nodes) < settings.cpus_per_trial:
            say(
                f"no node has {settings.cpus_per_trial:g} CPUs for a trial, the largest has"
                f" {max(nodes):g}: the search waits until one does, or lower --cpus-per-trial"
            )

    def run(self, categories: Sequence[Category]) -> None:
        """Search, fit and register every category; failures are collected, not raised."""
        places = {category.name: place for place, category in enumerate(categories, 1)}
        with ThreadPoolExecutor(max_workers=1) as background:
            for category, encoding in self._encode_ahead(categories):
                label = f"[{places[category.name]}/{len(categories)}] {category.name}"
                with self._collecting_failure(category):
                    started = time.monotonic()
                    say(f"{label}: encoding {len(encoding.banks)} support sets")
                    ray.get(list(encoding.shots))
                    encoded = time.monotonic()
                    trials = self._run_trials(category, encoding.banks, label)
                    searched = time.monotonic()
                    background.submit(
                        self._finish,
                        category,
                        encoding.banks[0],
                        trials,
                        {"encode": encoded - started, "search": searched - encoded},
                        label,
                    )

    def _encode_ahead(self, categories: Sequence[Category]) -> Iterator[tuple[Category, _Encoding]]:
        """Each category with its banks; by then the encoding of the next has been started."""
        begun: deque[tuple[Category, _Encoding]] = deque()
        for category in categories:
            with self._collecting_failure(category):
                begun.append((category, self._encode(category)))
            if len(begun) > 1:
                yield begun.popleft()
        yield from begun

    def _encode(self, category: Category) -> _Encoding:
        settings = self._settings
        task = self._task(encode_bank)
        started = [
            task.remote(
                category.support_set(settings.shots, seed),
                backbone=settings.backbone,
                seed=seed,
                threads=settings.threads,
            )
            for seed in settings.support_seeds
        ]
        banks, shots = zip(*started, strict=True)
        return _Encoding(banks=banks, shots=shots)

    def _task(self, function: Callable[..., tuple[object, object]]) -> Any:
        """A function that returns a pair, as a Ray task that reserves as much as a trial."""
        return ray.remote(num_cpus=self._settings.cpus_per_trial, num_returns=2)(function)

    def _run_trials(self, category: Category, banks: Banks, label: str) -> list[TrialRecord]:
        settings = self._settings
        plan = TrialPlan(
            backbone=settings.backbone,
            banks=banks,
            settings=settings.fit_settings(),
            threads=settings.threads,
        )
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, plan=plan), {"CPU": settings.cpus_per_trial}
            ),
            param_space=search_space(),
            tune_config=tune.TuneConfig(
                metric="held_out",
                mode="max",
                num_samples=settings.trials,
                search_alg=BasicVariantGenerator(
                    points_to_evaluate=[starting_point()],
                    max_concurrent=self._live_trials,
                    random_state=settings.seed,
                ),
                scheduler=_scheduler(settings.scheduler),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=category.name,
                storage_path=settings.storage,
                callbacks=[Progress(label, settings.trials), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
                verbose=0,
            ),
        )
        trials = read_trials(tuner.fit())
        errors = [trial.error for trial in trials if trial.error is not None]
        if errors:
            say(f"{label}: {len(errors)} of {len(trials)} trials failed: {_reason(errors[0])}")
        return trials

    def _finish(
        self,
        category: Category,
        bank: "ObjectRef[SupportBank]",
        trials: list[TrialRecord],
        seconds: dict[str, float],
        label: str,
    ) -> None:
        """Fit the winner on all shots and register it; runs beside the next category's trials."""
        with self._collecting_failure(category):
            started = time.monotonic()
            winner = choose_winner(trials)
            settings = self._settings
            support = category.support_set(settings.shots, settings.support_seeds[0])
            others = [path for path in category.good if path not in support]
            task = self._task(fit_winner)
            fitted = task.remote(
                category.name,
                support,
                others,
                settings.fit_settings(winner.settings),
                backbone=settings.backbone,
                bank=bank,
                metrics=winner.metrics(),
                threads=settings.threads,
                test=category,
            )
            prompt_set, pictures = ray.get(fitted)
            version = self._registry.register(
                prompt_set,
                pictures={**pictures, "trials": draw_trials(trials, winner)},
                trials=[trial.row(settings.steps) for trial in trials],
                tags={
                    **self._provenance,
                    "support_seeds": ",".join(map(str, settings.support_seeds)),
                },
                support=support,
                held_out=others,
                pending=default_pending(),
            )
            seconds["register"] = time.monotonic() - started
            self.tuned.append(
                TunedCategory(
                    trials=trials,
                    winner=winner,
                    prompt_set=prompt_set,
                    version=version,
                    seconds=seconds,
                )
            )
            say(f"{label}: registered version {version.version}, {', '.join(version.aliases)}")

    @contextmanager
    def _collecting_failure(self, category: Category) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(_cause(error), AptError):
                traceback.print_exception(error)
            self.failures[category.name] = _reason(error)
            say(f"{category.name} failed: {_reason(error)}")


def _cause(error: Exception) -> Exception:
    """What went wrong in the worker process, if it was there."""
    return error.cause if isinstance(error, RayTaskError) else error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    return str(cause) if isinstance(cause, AptError) else f"{type(cause).__name__}: {cause}"


def _scheduler(name: Literal["asha", "none"]) -> TrialScheduler | None:
    if name == "none":
        return None
    return ASHAScheduler(time_attr="rung", max_t=RUNGS, grace_period=1, reduction_factor=2)
