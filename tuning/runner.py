"""The search over categories: one Ray Tune experiment for all of them.

A category is fitted and registered as soon as its last trial has ended, beside the trials of the
others.
"""

import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from apt_ray.anomalies.cache import default_cache_folder
from apt_ray.config import BackboneSpec
from apt_ray.data.folders import Category
from apt_ray.errors import AptError
from apt_ray.registry import Registry
from tuning.actors import Engines, are_encoded, start_encoding, start_engines
from tuning.banks import CategoryBanks
from tuning.encoding import Encoding, HasEnded
from tuning.finishing import Finisher
from tuning.outcome import Outcome
from tuning.progress import Progress, say
from tuning.records import SearchPlan, SearchStore
from tuning.searcher import CategoriesScheduler, CategoriesSearcher
from tuning.settings import EngineSettings, SearchSettings
from tuning.tracking import TrialLog
from tuning.trial import TrialPlan, run_trial

_TRIAL_CPUS = 0.01
_STARTS_AGAIN = 8
_STOP_S = 8.0
_CHECK_S = 0.5
_LOG_S = 300.0


class SearchStopped(BaseException):
    """SIGTERM, as `ray job stop` sends it. No Exception: nothing on its way may swallow it."""


class _StopRequest(tune.Callback):
    """Takes note of SIGTERM; what waits asks it now and then.

    The handler itself must not raise: inside of Ray's own calls that becomes a SystemError. It
    takes the signal over from ray.init(), which sets a handler of its own.
    """

    def __init__(self) -> None:
        self._is_made = False
        signal.signal(signal.SIGTERM, self._note)

    def check(self) -> None:
        """Raise SearchStopped, once, if the signal has come."""
        if self._is_made:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SearchStopped

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Check, ten times a second: Ray Tune calls it before each of its steps."""
        self.check()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._is_made = True


def run_search(
    categories: Sequence[Category],
    searched: SearchPlan,
    engine: EngineSettings,
    store: SearchStore,
    registry: Registry,
    provenance: Mapping[str, str],
    outcome: Outcome,
    *,
    progress: Path | None = None,
) -> None:
    """Search, fit and register categories on a connected Ray.

    Args:
        categories: What is searched.
        searched: How.
        engine: Where the arithmetic is done.
        store: Where everything is kept that must not be lost.
        registry: Where winners and trials go.
        provenance: Tags of every version.
        outcome: Where it is noted what has become of each category; failures are not raised.
        progress: File that says how far it is.

    Raises:
        SettingsError: No engine can be started.
        SearchStopped: SIGTERM came; what could be registered by then is.
    """
    began = time.time()
    settings = searched.settings
    stop_request = _StopRequest()
    try:
        engines = start_engines(
            settings.backbone,
            engine,
            live_trials=settings.live_trials,
            check=stop_request.check,
        )
        say(
            f"{len(engines.actors)} engine(s) ready, {engines.threads} threads each"
            if engines.are_shared
            else f"each trial has a backbone of its own, {engines.live_trials} run at a time"
        )
        fingerprints = engines.fingerprints(settings.judging())
        encoding, banks = encode_categories(
            categories, settings, engine, engines.fingerprint, fingerprints, outcome
        )
        plan = TrialPlan(
            store=store,
            settings=settings,
            banks=banks,
            fingerprints=fingerprints,
            engines=engines.actors if engines.are_shared else (),
            live_trials=engines.live_trials,
            threads=engine.threads or 1,
            began=began,
        )
        finisher = Finisher(
            settings,
            store,
            registry,
            provenance,
            outcome,
            fit=lambda job: engines.fit(job, banks[job.category].of(job.settings)),
            compare=engines.compare,
        )
        _Search(
            categories={category.name: category for category in categories},
            past=searched.past,
            plan=plan,
            engines=engines,
            encoding=encoding,
            finisher=finisher,
            log=TrialLog(registry, store.name),
            outcome=outcome,
            stop_request=stop_request,
            progress=progress,
        ).run()
    except SearchStopped:
        say(f"stopped: go on with --resume {store.name}")
        raise


def encode_categories(
    categories: Sequence[Category],
    settings: SearchSettings,
    engine: EngineSettings,
    fingerprint: str,
    judging: Mapping[BackboneSpec, str],
    outcome: Outcome,
) -> tuple[Encoding, dict[str, CategoryBanks]]:
    """The banks and judges of all categories on their way; one without enough images fails."""
    folder = engine.bank_cache
    cache = default_cache_folder() if folder is None else Path(folder) if folder else None
    banks: dict[str, CategoryBanks] = {}
    tasks: dict[str, HasEnded] = {}
    for category in categories:
        try:
            supports = [
                category.support_set(settings.shots, seed) for seed in settings.support_seeds
            ]
            made = [
                (spec, support, settings.backbone)
                for spec, support in settings.bank_specs(supports, fingerprint=fingerprint)
            ]
            judges = [
                (spec, support, backbone)
                for backbone, seen in judging.items()
                for spec, support in settings.judge_specs(supports, fingerprint=seen)
            ]
        except AptError as error:
            outcome.fail(category.name, error)
            continue
        banks[category.name], encoded = start_encoding(made, judges, cache=cache)
        tasks[category.name] = partial(are_encoded, encoded)
    return Encoding(tasks), banks


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The trials of all categories, and the end of each category."""

    categories: Mapping[str, Category]
    past: Mapping[str, Sequence[Mapping[str, Any]]]
    plan: TrialPlan
    engines: Engines
    encoding: Encoding
    finisher: Finisher
    log: TrialLog
    outcome: Outcome
    stop_request: _StopRequest
    progress: Path | None
    _ended: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def run(self) -> None:
        try:
            self._run_trials()
            for name, category in self.categories.items():
                is_whole = len(self._ended[name]) == self.plan.settings.trials
                self.finisher.start(category, "complete" if is_whole else "cut off")
            while not self.finisher.wait(_CHECK_S):
                self.stop_request.check()
            self.log.close(_LOG_S)
        except SearchStopped:
            self._stop()
            raise
        if self.log.missing:
            store = self.plan.store
            say(
                f"{self.log.missing} trials are not in MLflow, they are kept in {store.uri}: write"
                f" them with --resume {store.name}"
            )
        say(f"MLflow took {self.log.seconds:.1f} s for the trials, beside the search")

    def _run_trials(self) -> None:
        """Run what is left of the trials of all categories that can be searched."""
        settings, store = self.plan.settings, self.plan.store
        records = {category: store.trials(category) for category in self.encoding.categories}
        ended = [record for known in records.values() for record in known if record.has_ended]
        if ended:
            say(f"{len(ended)} trials have ended before, they are not run again")
        if not self.engines.are_shared:
            self._wait_for_banks()
        run_trials(
            self.plan,
            CategoriesSearcher(
                settings, records, self.encoding.state, self._take_in, past=self.past
            ),
            trials=settings.trials * len(records),
            callbacks=[
                self.stop_request,
                Progress(
                    list(records),
                    settings.trials,
                    settings.steps,
                    self._end_trial,
                    file=self.progress,
                ),
            ],
        )

    def _wait_for_banks(self) -> None:
        """Trials that hold CPUs of their own would leave none to encode the other categories."""
        started = time.monotonic()
        names = self.encoding.categories
        say(f"encoding support sets of {len(names)} categories, once for all trials")
        told = 0
        self._take_in()
        while self.encoding.is_waiting:
            ready = sum(self.encoding.state(name) == "ready" for name in names)
            if ready > told:
                say(f"support sets encoded: {ready} of {len(names)} categories")
                told = ready
            time.sleep(_CHECK_S)
            self._take_in()
        say(f"support sets encoded in {time.monotonic() - started:.0f} s")

    def _take_in(self) -> None:
        """Find out what has come from outside: a request to stop, banks."""
        self.stop_request.check()
        for category, error in self.encoding.poll().items():
            self.outcome.fail(category, error)

    def _end_trial(self, name: str, number: int) -> None:
        """Close a trial's record; the last one's end is that of its category's search."""
        store = self.plan.store
        record = store.trial(name, number)
        if record is not None:
            if not record.has_ended:
                record = record.model_copy(update={"status": "stopped early"})
                store.save_trial(record)
            self.log.add([record])
        self._ended[name].add(number)
        if len(self._ended[name]) == self.plan.settings.trials:
            self.finisher.start(self.categories[name], "complete")

    def _stop(self) -> None:
        """Register the best so far of every category that is not done, within seconds."""
        deadline = time.monotonic() + _STOP_S
        say("stopping: the best so far becomes the candidate")
        self.finisher.hurry()
        self.engines.drain(1.0)
        for name, category in self.categories.items():
            if any(trial.steps for trial in self.plan.store.trials(name)):
                self.finisher.start(category, "cut off")
        self.finisher.wait(deadline - time.monotonic())
        self.log.close(max(0.0, deadline - time.monotonic()))


def run_trials(
    plan: TrialPlan,
    searcher: CategoriesSearcher,
    *,
    trials: int,
    callbacks: Sequence[tune.Callback] = (),
) -> None:
    """Run trials with Ray Tune until all have ended; what they report is in the plan's store."""
    settings = plan.settings
    cpus = _TRIAL_CPUS if plan.engines else float(plan.threads)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"CPU": cpus}),
        tune_config=tune.TuneConfig(
            metric="validation",
            mode="max",
            num_samples=trials,
            search_alg=searcher,
            scheduler=CategoriesScheduler(settings),
            max_concurrent_trials=plan.live_trials,
            time_budget_s=settings.time_budget_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"ray_tune-{plan.began:.0f}",
            storage_path=plan.store.uri,
            failure_config=tune.FailureConfig(max_failures=_STARTS_AGAIN),
            callbacks=list(callbacks),
            verbose=0,
        ),
    ).fit()
