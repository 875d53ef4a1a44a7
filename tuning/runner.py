"""The search over categories: one Ray Tune experiment for all of them.

A category is fitted and registered as soon as its last trial has ended, beside the trials of the
others.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from PIL import Image
from ray import ObjectRef, tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial

from apt_ray.anomalies.bank import default_cache_folder
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import AptError
from apt_ray.registry import Registry
from apt_ray.validation.versions import HeldOutComparison
from tuning.calls import BankName
from tuning.cluster import Engines, FitJob, start_encoding, start_engines, wait_until_ready
from tuning.finishing import Finisher
from tuning.progress import Progress, say
from tuning.records import SearchStore
from tuning.results import TunedCategory
from tuning.searcher import CategoriesScheduler, CategoriesSearcher
from tuning.settings import EngineSettings, SearchSettings
from tuning.tracking import TrialLog
from tuning.trial import Banks, TrialPlan, run_trial

_TRIAL_CPUS = 0.01
_STARTS_AGAIN = 8
_STOP_S = 8.0
_CHECK_S = 0.5
_LOG_S = 300.0


class SearchStopped(BaseException):
    """SIGTERM, as `ray job stop` sends it. No Exception: nothing on its way may swallow it."""


class _StopRequest(tune.Callback):
    """Takes note of SIGTERM; what waits asks it now and then.

    The handler itself must not raise: inside of Ray's own calls that becomes a SystemError.
    """

    def __init__(self) -> None:
        self._is_made = False

    def listen(self) -> None:
        """Take the signal over; after ray.init(), which sets a handler of its own."""
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


class Search:
    """The search over some categories on a connected Ray.

    Args:
        categories: What is searched.
        settings: How.
        engine: Where the arithmetic is done.
        store: Where everything is kept that must not be lost.
        registry: Where winners and trials go.
        provenance: Tags of every version.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        settings: SearchSettings,
        engine: EngineSettings,
        store: SearchStore,
        registry: Registry,
        provenance: Mapping[str, str],
    ) -> None:
        self._categories = {category.name: category for category in categories}
        self._settings, self._engine, self._store = settings, engine, store
        self._registry = registry
        self._began = time.time()
        self._finisher = Finisher(
            settings, store, registry, provenance, fit=self._fit, compare=self._compare
        )
        self._stop_request = _StopRequest()
        self._engines: Engines | None = None
        self._banks: dict[BankName, Banks] = {}
        self._encoding: dict[str, tuple[ObjectRef[int], ...]] = {}
        self._ended: dict[str, set[int]] = {name: set() for name in self._categories}

    @property
    def tuned(self) -> list[TunedCategory]:
        """What was registered so far."""
        return self._finisher.tuned

    @property
    def failures(self) -> dict[str, str]:
        """Category -> why it was not registered."""
        return self._finisher.failures

    def run(self) -> None:
        """Search, fit and register every category; failures are collected, not raised.

        Raises:
            SettingsError: No engine can be started.
            SearchStopped: SIGTERM came; what could be registered by then is.
        """
        self._log = TrialLog(self._registry, self._store.name)
        self._stop_request.listen()
        try:
            self._start_engines()
            for category in self._categories.values():
                self._encode(category)
            self._run_trials()
            for name, category in self._categories.items():
                is_whole = len(self._ended[name]) == self._settings.trials
                self._finisher.start(category, "complete" if is_whole else "cut off")
            while not self._finisher.wait(_CHECK_S):
                self._stop_request.check()
            self._log.close(_LOG_S)
        except SearchStopped:
            self._stop()
            raise
        if self._log.missing:
            say(
                f"{self._log.missing} trials are not in MLflow, they are kept in {self._store.uri}:"
                f" write them with --resume {self._store.name}"
            )
        say(f"MLflow took {self._log.seconds:.1f} s for the trials, beside the search")

    def _start_engines(self) -> None:
        # Every live trial may ask, and a fit may run.
        self._engines = start_engines(
            self._settings.backbone, self._engine, callers=self._settings.live_trials + 2
        )
        wait_until_ready(self._engines, self._stop_request.check)
        if self._engines.are_shared:
            say(
                f"{len(self._engines.actors)} engine(s) ready, {self._engines.threads} threads each"
            )
        else:
            say("each trial has a backbone of its own")

    def _run_trials(self) -> None:
        """Run what is left of the trials of all categories that can be searched."""
        assert self._engines is not None
        settings = self._settings
        records = {category: self._store.trials(category) for category in self._encoding}
        ended = [record for known in records.values() for record in known if record.has_ended]
        if ended:
            say(f"{len(ended)} trials have ended before, they are not run again")
        if not self._engines.are_shared:
            self._wait_for_banks()
        plan = TrialPlan(
            store=self._store,
            settings=settings,
            banks=self._banks,
            engines=self._engines.actors if self._engines.are_shared else (),
            threads=self._engine.threads or 1,
            began=self._began,
        )
        run_trials(
            plan,
            CategoriesSearcher(settings, records, self._is_ready),
            trials=settings.trials * len(records),
            callbacks=[
                self._stop_request,
                Progress(list(records), settings.trials, settings.steps, self._end_trial),
            ],
        )

    def _encode(self, category: Category) -> None:
        assert self._engines is not None
        settings, folder = self._settings, self._engine.bank_cache
        try:
            supports = [
                category.support_set(settings.shots, seed) for seed in settings.support_seeds
            ]
        except AptError as error:
            self._finisher.fail(category.name, error)
            return
        cache = default_cache_folder() if folder is None else Path(folder) if folder else None
        encoding: list[ObjectRef[int]] = []
        for name in settings.bank_names(category.name):
            self._banks[name], shots = start_encoding(
                name,
                supports,
                settings.support_seeds,
                backbone=settings.backbone,
                fingerprint=self._engines.fingerprint,
                cache=cache,
            )
            encoding += shots
        self._encoding[category.name] = tuple(encoding)

    def _wait_for_banks(self) -> None:
        """Trials that hold CPUs of their own would leave none to encode the other categories."""
        started = time.monotonic()
        while any(self._is_ready(name) is False for name in list(self._encoding)):
            self._stop_request.check()
            time.sleep(_CHECK_S)
        say(f"support sets encoded in {time.monotonic() - started:.0f} s")

    def _is_ready(self, name: str) -> bool | None:
        """Whether the banks of a category are encoded; None if they cannot be."""
        if name in self.failures:
            return None
        shots = self._encoding.get(name, ())
        if shots:
            _, missing = ray.wait(list(shots), num_returns=len(shots), timeout=0)
            if missing:
                return False
            try:
                ray.get(list(shots))
            except Exception as error:
                self._finisher.fail(name, error)
                return None
            del self._encoding[name]
        return True

    def _end_trial(self, name: str, number: int) -> None:
        """Close a trial's record; the last one's end is that of its category's search."""
        record = self._store.trial(name, number)
        if record is not None:
            if not record.has_ended:
                record = record.model_copy(update={"status": "stopped early"})
                self._store.save_trial(record)
            self._log.add([record])
        self._ended[name].add(number)
        if len(self._ended[name]) == self._settings.trials:
            self._finisher.start(self._categories[name], "complete")

    def _fit(self, job: FitJob) -> tuple[bytes, dict[str, Image.Image]]:
        """Fit in an engine, which has the backbone and the bank."""
        fit: Any = self._engine_for(job.category).fit.options(max_task_retries=-1)
        fitted: Any = fit.remote(job, list(self._banks[job.bank]))
        result: tuple[bytes, dict[str, Image.Image]] = ray.get(fitted)
        return result

    def _compare(
        self, candidate: PromptSet, champion: PromptSet, images: Sequence[Image.Image]
    ) -> HeldOutComparison:
        """Compare in an engine, which has the backbone."""
        files = [prompt_set.to_bytes() for prompt_set in (candidate, champion)]
        engine = self._engine_for(candidate.category)
        compared: Any = engine.compare.options(max_task_retries=-1).remote(*files, list(images))
        comparison: HeldOutComparison = ray.get(compared)
        return comparison

    def _engine_for(self, category: str) -> "ActorHandle[Any]":
        """An engine for what is done once a category."""
        assert self._engines is not None
        place = list(self._categories).index(category) % len(self._engines.actors)
        return self._engines.actors[place]

    def _stop(self) -> None:
        """Register the best so far of every category that is not done, within seconds."""
        deadline = time.monotonic() + _STOP_S
        say("stopping: the best so far becomes the candidate")
        self._finisher.hurry()
        if self._engines is not None:
            ray.wait([actor.drain.remote() for actor in self._engines.actors], timeout=1.0)
            for name, category in self._categories.items():
                if any(trial.steps for trial in self._store.trials(name)):
                    self._finisher.start(category, "cut off")
        self._finisher.wait(deadline - time.monotonic())
        self._log.close(max(0.0, deadline - time.monotonic()))
        say(f"stopped: go on with --resume {self._store.name}")


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
            metric="held_out",
            mode="max",
            num_samples=trials,
            search_alg=searcher,
            scheduler=CategoriesScheduler(settings),
            max_concurrent_trials=settings.live_trials,
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
