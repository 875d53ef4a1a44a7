"""The search, as a Ray job: for each category the best settings, fitted and registered.

    ray job submit --working-dir . -- python tuning/search.py --data DIR --shots 4 --trials 8

Categories are searched one after another by Ray Tune. While one is searched, the support sets of
the next are encoded and the winner of the one before is fitted and registered. A category that
fails leaves the others alone. Exit code: 0 if every category was registered, 1 if not, 2 for a
wrong command line.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ray
from pydantic import Field, field_validator
from ray import ObjectRef, tune
from ray.exceptions import RayTaskError
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from apt_ray.bank import SupportBank
from apt_ray.config import BackboneSpec, FitSettings, Settings
from apt_ray.data.folders import Category, find_categories
from apt_ray.errors import AptError, SettingsError
from apt_ray.registry import Registry
from tuning.progress import Progress, say
from tuning.results import (
    TrialRecord,
    TunedCategory,
    choose_winner,
    closing_table,
    draw_trials,
    read_trials,
)
from tuning.space import search_space, starting_point
from tuning.trial import RUNGS, Banks, TrialPlan, encode_bank, fit_winner, run_trial


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoding:
    """The banks of a category on their way; `shots` is small, and raises what went wrong."""

    banks: Banks
    shots: "tuple[ObjectRef[int], ...]"


class SearchSettings(Settings):
    """What one search does with each category."""

    shots: int = Field(ge=1)
    support_seeds: tuple[int, ...] = Field(min_length=1)
    trials: int = Field(ge=1)
    steps: int = Field(ge=RUNGS)
    seed: int = Field(ge=0)
    live_trials: int | None = Field(ge=1)
    cpus_per_trial: float = Field(gt=0)
    scheduler: Literal["asha", "none"]
    storage: str
    backbone: BackboneSpec

    @field_validator("support_seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must differ from one another")
        return seeds

    def fit_settings(self, searched: Mapping[str, Any] = MappingProxyType({})) -> FitSettings:
        """The settings of a fit to the first support set, with searched values in place."""
        return FitSettings.parse({"steps": self.steps, "seed": self.support_seeds[0], **searched})

    @property
    def threads(self) -> int:
        """PyTorch's threads in one worker process."""
        return math.ceil(self.cpus_per_trial)


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
        cpus = ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
        self._live_trials = settings.live_trials or max(1, int(cpus))

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
        return read_trials(tuner.fit())

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
            task = self._task(fit_winner)
            fitted = task.remote(
                category.name,
                support,
                [path for path in category.good if path not in support],
                settings.fit_settings(winner.settings),
                backbone=settings.backbone,
                bank=bank,
                metrics=winner.metrics(),
                threads=settings.threads,
            )
            prompt_set, pictures = ray.get(fitted)
            version = self._registry.register(
                prompt_set,
                pictures={**pictures, "trials": draw_trials(trials, winner)},
                trials=[trial.row(settings.steps) for trial in trials],
                tags=self._provenance,
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
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, AptError):
                reason = str(cause)
            else:
                reason = f"{type(cause).__name__}: {cause}"
                traceback.print_exception(error)
            self.failures[category.name] = reason
            say(f"{category.name} failed: {reason}")


def _scheduler(name: Literal["asha", "none"]) -> TrialScheduler | None:
    if name == "none":
        return None
    return ASHAScheduler(time_attr="rung", max_t=RUNGS, grace_period=1, reduction_factor=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search from the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        settings = _settings(options)
    except SettingsError as error:
        parser.error(str(error))
    try:
        return _search(options, settings)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _search(options: argparse.Namespace, settings: SearchSettings) -> int:
    started = time.monotonic()
    categories = find_categories(options.data, options.categories)
    registry = Registry(options.mlflow)
    registry.check()
    _connect(options.ray_address)
    search = Search(settings, registry, _provenance())
    say(
        f"{len(categories)} categories x {settings.trials} trials of {settings.steps} steps,"
        f" {settings.shots} shots; registry at {registry.address}"
    )
    search.run(categories)
    seconds = time.monotonic() - started
    if search.tuned:
        print(f"\n{closing_table(search.tuned)}\n")
    say(f"{len(search.tuned)} of {len(categories)} categories registered in {seconds:.0f} s")
    for name, reason in search.failures.items():
        say(f"not registered: {name}: {reason}")
    if options.summary:
        summary = {
            "data": str(categories[0].root.parent),
            "registry": registry.address,
            "settings": settings.model_dump(),
            "provenance": _provenance(),
            "seconds": round(seconds, 2),
            "categories": [category.summary() for category in search.tuned]
            + [
                {"category": name, "status": "failed", "reason": reason}
                for name, reason in search.failures.items()
            ],
        }
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        options.summary.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if search.failures else 0


def _connect(address: str | None) -> None:
    """Connect to Ray, quietly: the search has its own lines of progress."""
    os.environ.update(
        RAY_AIR_NEW_OUTPUT="0",  # the only output of Tune that `verbose=0` silences altogether
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    remedy = (
        "start Ray with `ray start --head` and submit the search to it with `ray job submit`, or"
        " pass --ray-address local for a Ray of its own on this machine"
    )
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SettingsError(f"no Ray to run on, RAY_ADDRESS is not set: {remedy}")
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingsError(f"cannot connect to Ray at {address} ({error}): {remedy}") from error


def _provenance() -> dict[str, str]:
    """Tags that say which job, of which code, registered a version."""
    tags = {"ray.version": ray.__version__, "ray.job_id": ray.get_runtime_context().get_job_id()}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission = job.get("metadata", {}).get("job_submission_id")
    if submission:
        tags["ray.submission_id"] = submission
    commit = _git_commit(Path(__file__).resolve().parent.parent)
    if commit:
        tags["git_commit"] = commit
    return tags


def _git_commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, None if that is no checkout of its own."""
    try:
        lines = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = lines
    return commit if Path(top) == root else None


def _settings(options: argparse.Namespace) -> SearchSettings:
    storage = options.storage
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    return SearchSettings.parse(
        {
            "shots": options.shots,
            "support_seeds": options.seeds,
            "trials": options.trials,
            "steps": options.steps,
            "seed": options.seed,
            "live_trials": options.live_trials,
            "cpus_per_trial": options.cpus_per_trial,
            "scheduler": options.scheduler,
            "storage": f"{storage}/apt-ray-{datetime.now():%Y%m%d-%H%M%S}",
            "backbone": {
                "name": options.backbone,
                "pretrained": options.pretrained,
                "quick_gelu": options.quick_gelu,
            },
        }
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuning/search.py",
        description="Search the best settings of each category with Ray Tune, fit its prompt set "
        "with them and register it in MLflow.",
    )
    data = parser.add_argument_group("pictures")
    data.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of categories, the same absolute path on every node",
    )
    data.add_argument(
        "--categories",
        type=_names,
        default=(),
        metavar="A,B",
        help="search only these (default: all in DIR)",
    )
    data.add_argument(
        "--shots",
        type=int,
        default=4,
        metavar="K",
        help="good pictures that each prompt set is fitted to (default: %(default)s)",
    )
    data.add_argument(
        "--seeds",
        type=_integers,
        default=(0, 1, 2),
        metavar="S,S",
        help="support seeds: each draws K good pictures, a trial is judged on all draws, the "
        "winner is fitted to the first (default: 0,1,2)",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--trials",
        type=int,
        default=8,
        metavar="N",
        help="settings that are tried in each category (default: %(default)s)",
    )
    search.add_argument(
        "--steps",
        type=int,
        default=FitSettings().steps,
        metavar="N",
        help="optimisation steps of a trial and of the final fit (default: %(default)s)",
    )
    search.add_argument(
        "--scheduler",
        choices=("asha", "none"),
        default="asha",
        help=f"asha stops the worse half of the trials after 1/{RUNGS} and after 2/{RUNGS} of the "
        "steps, none stops nothing (default: %(default)s)",
    )
    search.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the settings that are tried (default: %(default)s)",
    )
    search.add_argument(
        "--storage",
        default="~/ray_results",
        metavar="DIR",
        help="where Ray Tune keeps the state of its trials (default: %(default)s)",
    )
    model = parser.add_argument_group("backbone")
    model.add_argument(
        "--backbone",
        default=BackboneSpec().name,
        metavar="NAME",
        help="'builtin', or an architecture of open_clip such as ViT-B-16 (default: %(default)s)",
    )
    model.add_argument(
        "--pretrained",
        metavar="TAG|FILE",
        help="pretrained tag of open_clip, or a checkpoint file that lies on every node",
    )
    model.add_argument(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a checkpoint file was trained with QuickGELU, as OpenAI's were",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster, or 'local' for one of its own (default: RAY_ADDRESS, which a job has)",
    )
    cluster.add_argument(
        "--live-trials",
        type=int,
        metavar="N",
        help="trials that run at a time (default: one for each CPU of the cluster)",
    )
    cluster.add_argument(
        "--cpus-per-trial",
        type=float,
        default=0.5,
        metavar="C",
        help="CPUs that a trial reserves; it computes on as many threads, rounded up "
        "(default: %(default)s)",
    )
    cluster.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow server that is the registry (default: MLFLOW_TRACKING_URI)",
    )
    cluster.add_argument(
        "--summary", type=Path, metavar="FILE", help="write what was found to this JSON file"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1,2") from None


if __name__ == "__main__":
    sys.exit(main())
