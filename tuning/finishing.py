"""The end of a category's search: its winner is fitted on all shots and registered, once."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Literal

from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import RegistryError
from apt_ray.files import Location
from apt_ray.images import encode_png
from apt_ray.registry import CHAMPION, RegisteredVersion, Registry, default_pending, promote
from apt_ray.registry.promotion import Compare
from tuning.actors import FitJob
from tuning.outcome import Outcome
from tuning.progress import say
from tuning.records import SearchStore, TrialRecord
from tuning.report.plots import draw_plots
from tuning.results import Importance, TunedCategory, choose_winner, importances, say_what_was_found
from tuning.settings import SearchSettings

_REGISTRY_PATIENCE_S = 600.0
_REGISTRY_RETRY_S = 5.0

SearchStatus = Literal["complete", "cut off"]
"""Whether all trials of a category have ended; one that was cut off may be resumed."""

Fit = Callable[[FitJob], tuple[bytes, dict[str, Image.Image]]]
"""Fits somewhere on the cluster: the file of the prompt set, and images."""


class Finisher:
    """Fits and registers categories in the background.

    Args:
        settings: Of the search.
        store: Where the trials are, and where the winners are kept.
        registry: Where the winners go; while it is away, they wait.
        provenance: Tags of every version.
        outcome: Where what came of them is noted; what has failed there is not begun.
        fit: Fits on the cluster.
        compare: Judges a winner against the champion, on the cluster.
    """

    def __init__(
        self,
        settings: SearchSettings,
        store: SearchStore,
        registry: Registry,
        provenance: Mapping[str, str],
        outcome: Outcome,
        *,
        fit: Fit,
        compare: Compare,
    ) -> None:
        self._settings, self._store, self._registry = settings, store, registry
        self._provenance = {**provenance, "search": store.name}
        self._outcome, self._fit, self._compare = outcome, fit, compare
        self._hurry = Event()
        self._pool = ThreadPoolExecutor(thread_name_prefix="finish")
        self._futures: dict[str, Future[None]] = {}

    def start(self, category: Category, status: SearchStatus) -> None:
        """Finish a category with what its trials have reported; a second time does nothing.

        One that was cut off is registered as a candidate, and may be resumed.
        """
        if category.name not in self._futures and category.name not in self._outcome.failures:
            self._futures[category.name] = self._pool.submit(self._finish, category, status)

    def hurry(self) -> None:
        """Wait no longer for a registry that is away."""
        self._hurry.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether all that was started has ended, by the time that is given."""
        return not wait(self._futures.values(), timeout_s).not_done

    def _finish(self, category: Category, status: SearchStatus) -> None:
        try:
            tuned = self._fit_and_register(category, status)
        except Exception as error:
            self._outcome.fail(category.name, error)
        else:
            self._outcome.succeed(tuned)

    def _fit_and_register(self, category: Category, status: SearchStatus) -> TunedCategory:
        name, settings, started = category.name, self._settings, time.monotonic()
        trials = self._store.trials(name)
        winner, verdict = choose_winner(trials), say_what_was_found(trials)
        say(f"{name}: {verdict}")
        shares = importances(trials, settings.space)
        plots = draw_plots(trials, winner, settings.space, shares)
        for plot, picture in plots.items():
            self._store.write(f"{name}/plots/{plot}.png", encode_png(picture))
        support = category.support_set(settings.shots, settings.support_seeds[0])
        others = [path for path in category.good if path not in support]
        fit_settings = settings.fit_settings(winner.settings)
        if status == "cut off":
            # Whoever stops a search waits: no further than the winner has come.
            fit_settings = fit_settings.model_copy(update={"steps": winner.steps[-1]})
        content, pictures = self._fit(
            FitJob(
                category=name,
                support=support,
                calibration=others,
                backbone=settings.backbone_of(winner.settings),
                settings=fit_settings,
                metrics=winner.metrics(),
                labelled=category if status == "complete" else None,
            )
        )
        self._store.write(f"{name}/prompt_set.safetensors", content)
        prompt_set, fitted = PromptSet.from_bytes(content), time.monotonic()
        version = self._register(
            prompt_set,
            pictures | plots,
            trials,
            shares,
            status,
            {"search_verdict": verdict},
            support=support,
            others=others,
        )
        if self._settings.promote == "auto" and status == "complete":
            version = self._promote(version, others)
        return TunedCategory(
            trials=trials,
            winner=winner,
            verdict=verdict,
            importances=shares,
            prompt_set=prompt_set,
            version=version,
            seconds={
                "search": max(trial.seconds[-1] for trial in trials if trial.seconds),
                "fit": fitted - started,
                "register": time.monotonic() - fitted,
            },
        )

    def _register(
        self,
        prompt_set: PromptSet,
        pictures: Mapping[str, Image.Image],
        trials: Sequence[TrialRecord],
        shares: Mapping[str, Importance],
        status: SearchStatus,
        found: Mapping[str, str],
        *,
        support: Sequence[Location],
        others: Sequence[Location],
    ) -> RegisteredVersion:
        """Register; a version that this search has registered before it was killed stays the only
        one."""
        tags = {
            **self._provenance,
            **found,
            "search_status": status,
            "support_seeds": ",".join(map(str, self._settings.support_seeds)),
            **{f"importance.{setting}": str(share) for setting, share in shares.items()},
        }
        reports = sum(len(trial.steps) for trial in trials)
        deadline = time.monotonic() + _REGISTRY_PATIENCE_S
        while True:
            is_last = self._hurry.is_set() or time.monotonic() > deadline
            try:
                return self._registry.register(
                    prompt_set,
                    pictures=pictures,
                    trials=[trial.row() for trial in trials],
                    tags=tags,
                    support=support,
                    held_out=others,
                    promote=self._settings.promote == "auto" and status == "complete",
                    submission=f"{self._store.name}/{prompt_set.category}/{status}/{reports}",
                    pending=default_pending() if is_last else None,
                )
            except RegistryError as error:
                if is_last:
                    raise
                say(f"{prompt_set.category} waits for the registry: {error}")
                self._hurry.wait(_REGISTRY_RETRY_S)

    def _promote(self, version: RegisteredVersion, normal: Sequence[Location]) -> RegisteredVersion:
        """Hold a version against the champion; it stays a candidate if it is not better.

        A verdict that was given before the search was killed stands.
        """
        if CHAMPION in version.aliases or "verdict" in version.tags:
            return version
        category, number = version.category, str(version.version)
        try:
            promotion = promote(
                self._registry, category, number, normal=normal, compare=self._compare
            )
            say(f"{category}: version {number} was {promotion.verdict}: {promotion.why}")
            return self._registry.resolve(category, number)
        except RegistryError as error:
            say(f"{category}: version {number} stays a candidate: {error}")
            return version
