"""The search, as a Ray job: for each category the best settings, fitted and registered.

    ray job submit --working-dir . -- python tuning/search.py --data DIR --shots 4 --trials 8

Exit code: 0 if every category was registered, 1 if not (the others are kept), 2 for a wrong
command line, 143 if it was stopped.
"""

import argparse
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from apt_ray.cli.flags import add_backbone_flags, given_backbone
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.errors import AptError, SettingsError
from apt_ray.files import location
from apt_ray.optional import require
from tuning.settings import RUNGS, EngineSettings, SearchSettings
from tuning.space import DEFAULT_SPACE, read_space

# Ray, PyTorch and MLflow are imported inside, so that `--help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search from the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.register_pending:
        return _register_pending(options)
    if options.data is None and options.resume is None:
        parser.error("--data is required, or --resume")
    try:
        engine = _engine(options)
        settings = None if options.resume else _settings(options)
    except SettingsError as error:
        parser.error(str(error))
    try:
        return _search(options, settings, engine)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _search(
    options: argparse.Namespace, settings: SearchSettings | None, engine: EngineSettings
) -> int:
    started = time.monotonic()
    require("ray", "optuna", "sklearn", "pyarrow", "mlflow", "matplotlib", extra="tune")

    from tuning.records import SearchStore

    # Two people who start at the same second share a registry, and maybe a storage.
    fresh = f"apt-ray-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    name = options.resume or fresh
    store = SearchStore(options.storage, name)
    if settings is None:
        settings, data, categories = _planned(store, options.time_budget)
        store.check_writable()
    else:
        data, categories = str(options.data), find_categories(options.data, options.categories)
        store.create(
            {
                "data": data,
                "categories": [category.name for category in categories],
                "settings": settings.model_dump(mode="json"),
            }
        )

    from apt_ray.registry import Registry
    from tuning.progress import say
    from tuning.results import closing_table
    from tuning.runner import Search, SearchStopped

    registry = Registry(options.mlflow)
    registry.check()
    _connect(options.ray_address)
    provenance = _provenance()
    say(
        f"search {name}: {len(categories)} categories x {settings.trials} trials of"
        f" {settings.steps} steps, {settings.shots} shots; registry at {registry.address}"
    )
    say(f"if it is cut off: --storage {options.storage} --resume {name}")
    search = Search(categories, settings, engine, store, registry, provenance)
    is_stopped = False
    try:
        search.run()
    except SearchStopped:
        is_stopped = True
    seconds = time.monotonic() - started
    if search.tuned:
        print(f"\n{closing_table(search.tuned)}\n")
    say(f"{len(search.tuned)} of {len(categories)} categories registered in {seconds:.0f} s")
    for category, reason in search.failures.items():
        say(f"not registered: {category}: {reason}")
    if options.summary:
        summary = {
            "search": name,
            "data": data,
            "registry": registry.address,
            "settings": settings.model_dump(mode="json"),
            "provenance": provenance,
            "seconds": round(seconds, 2),
            "categories": [category.summary() for category in search.tuned]
            + [
                {"category": category, "status": "failed", "reason": reason}
                for category, reason in search.failures.items()
            ],
        }
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        options.summary.write_text(json.dumps(summary, indent=2) + "\n")
    if is_stopped:
        # Threads may still wait for a registry or a fit; nothing that they do is needed any more.
        sys.stdout.flush()
        os._exit(143)
    return 1 if search.failures else 0


def _register_pending(options: argparse.Namespace) -> int:
    """Register what earlier searches found while the registry was away."""
    count = 0
    try:
        from apt_ray.registry import Registry, default_pending

        pending = default_pending()
        for version in Registry(options.mlflow).register_pending(pending):
            print(f"{version.category}: registered version {version.version}", flush=True)
            count += 1
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} versions registered; none waits in {pending}")
    return 0


def _planned(store: Any, time_budget_s: float | None) -> tuple[SearchSettings, str, list[Category]]:
    """What a search that is resumed was about."""
    plan = store.plan()
    settings = SearchSettings.parse(plan["settings"] | {"time_budget_s": time_budget_s})
    return settings, plan["data"], find_categories(location(plan["data"]), plan["categories"])


def _connect(address: str | None) -> None:
    """Connect to Ray, and keep it and Ray Tune quiet: the search has its own lines of progress."""
    address = address or os.environ.get("RAY_ADDRESS")
    remedy = (
        "start Ray with `ray start --head` and submit the search to it with `ray job submit`, or"
        " pass --ray-address local for a Ray of its own on this machine"
    )
    if not address:
        raise SettingsError(f"there is no Ray to run on, RAY_ADDRESS is not set: {remedy}")
    os.environ.update(
        RAY_IGNORE_UNHANDLED_ERRORS="1",  # each failure is reported once, by the search itself
        RAY_AIR_NEW_OUTPUT="0",  # the only output of Tune that `verbose=0` silences altogether
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    )
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        _check_reachable(address)
        ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SettingsError(f"cannot connect to Ray at {address} ({error}): {remedy}") from error


def _provenance() -> dict[str, str]:
    """Tags that say which job, of which code, registered a version."""
    import ray

    tags = {"ray.version": ray.__version__, "ray.job_id": ray.get_runtime_context().get_job_id()}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission = job.get("metadata", {}).get("job_submission_id")
    if submission:
        tags["ray.submission_id"] = submission
    # A job runs from a package of the checkout, without its history.
    commit = os.environ.get("GIT_COMMIT") or _git_commit(Path(__file__).resolve().parent.parent)
    if commit:
        tags["git_commit"] = commit
    return tags


def _check_reachable(address: str) -> None:
    """Fail at once where Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


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
    return SearchSettings.parse(
        {
            "shots": options.shots,
            "support_seeds": options.seeds,
            "trials": options.trials,
            "live_trials": options.live_trials,
            "searcher": options.searcher,
            "scheduler": options.scheduler,
            "objective": options.objective,
            "steps": options.max_steps,
            "time_budget_s": options.time_budget,
            "seed": options.seed,
            "promote": options.promote,
            "space": read_space(options.space) if options.space else DEFAULT_SPACE,
            "backbone": given_backbone(options),
        }
    )


def _engine(options: argparse.Namespace) -> EngineSettings:
    return EngineSettings.parse(
        {
            "mode": options.engine,
            "gpus": options.engine_gpus,
            "threads": options.engine_threads,
            "bank_cache": options.bank_cache,
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
        type=location,
        metavar="DIR",
        help="folder of categories, the same absolute path on every node, or s3://bucket/prefix",
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
        "--live-trials",
        type=int,
        default=8,
        metavar="N",
        help="trials that run at a time, over all categories (default: %(default)s)",
    )
    search.add_argument(
        "--searcher",
        choices=("random", "optuna"),
        default="random",
        help="draw settings at random, or where Optuna expects good values (default: %(default)s)",
    )
    search.add_argument(
        "--scheduler",
        choices=("asha", "none"),
        default="asha",
        help=f"asha stops the worse half of the trials after 1/{RUNGS} and after 2/{RUNGS} of the "
        "steps, none stops nothing (default: %(default)s)",
    )
    search.add_argument(
        "--objective",
        choices=("mean", "pareto"),
        default="mean",
        help="the mean of the held-out values of images and of pixels, or both as two objectives "
        "(with --searcher optuna --scheduler none); the mean chooses the winner either way "
        "(default: %(default)s)",
    )
    search.add_argument(
        "--max-steps",
        "--steps",
        type=int,
        default=FitSettings().steps,
        metavar="N",
        help="optimisation steps of a trial and of the final fit (default: %(default)s)",
    )
    search.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="start no trial and stop those that run after this long; the best so far is "
        "registered as candidate (default: none)",
    )
    search.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="YAML file with other settings to search, such as `smgs_weight: {low: 0, high: 1}`",
    )
    search.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the settings that are tried (default: %(default)s)",
    )
    search.add_argument(
        "--promote",
        choices=("auto", "never"),
        default="auto",
        help="auto lets a winner become the champion by the registry's rules, never leaves it a "
        "candidate (default: %(default)s)",
    )
    search.add_argument(
        "--storage",
        default="~/ray_results",
        metavar="DIR",
        help="where the state of the search is kept: a folder, on a cluster one that all nodes "
        "share, or s3:// (default: %(default)s)",
    )
    search.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with a search of that name in the storage; it keeps its own settings and data, "
        "and trials that have ended are not run again",
    )
    add_backbone_flags(parser)
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster, or 'local' for one of its own (default: RAY_ADDRESS, which a job has)",
    )
    cluster.add_argument(
        "--engine",
        choices=("auto", "shared", "own"),
        default="auto",
        help="shared: one process a GPU, or a node where there is none, batches all trials; own: "
        "each live trial has a CPU and a backbone of its own, which is faster there; auto: shared "
        "where there are GPUs, else own (default: %(default)s)",
    )
    cluster.add_argument(
        "--engine-gpus",
        type=float,
        default=1.0,
        metavar="G",
        help="GPU fraction of a shared engine (default: %(default)s)",
    )
    cluster.add_argument(
        "--engine-threads",
        type=int,
        metavar="N",
        help="PyTorch's threads in an engine on CPUs (default: all CPUs of its node; own: 1)",
    )
    cluster.add_argument(
        "--bank-cache",
        metavar="DIR",
        help="where encoded support sets are kept on each node, '' for nowhere "
        "(default: ~/.cache/apt-ray/banks)",
    )
    cluster.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow server that is the registry (default: MLFLOW_TRACKING_URI)",
    )
    cluster.add_argument(
        "--register-pending",
        action="store_true",
        help="search nothing; register what earlier searches on this machine found while the"
        " registry was away",
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
