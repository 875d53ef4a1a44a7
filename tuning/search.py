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
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_ray.cli.common import run
from apt_ray.cli.flags import add_backbone_flags, add_flags, given, given_backbone
from apt_ray.cli.registry import register_pending
from apt_ray.data.folders import Category, find_categories
from apt_ray.errors import SettingsError, WriteError
from apt_ray.files import check_writable, keep, location, write_json
from apt_ray.machine import settle
from apt_ray.optional import require
from tuning.settings import EngineSettings, SearchSettings
from tuning.space import read_space

if TYPE_CHECKING:
    from tuning.records import SearchPlan, SearchStore

# Ray, PyTorch and MLflow are imported inside, so that `--help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search from the command line; returns the exit code."""
    command = read_command(arguments)
    settle()
    if command.options.dry_run:
        return run(lambda: _estimate(command))
    if command.options.register_pending:
        return run(lambda: register_pending(command.options.mlflow))
    return run(lambda: _search(command))


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command line.

    Attributes:
        options: What is no setting: where things are and go.
        settings: Of the search; of one that is resumed only the time budget counts.
        engine: Where the search computes.
    """

    options: argparse.Namespace
    settings: SearchSettings
    engine: EngineSettings


def read_command(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; SystemExit with status 2 if it is wrong, after saying why."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.data or options.resume or options.register_pending):
        parser.error("--data is required, or --resume")
    if options.dry_run and not options.data:
        parser.error("--dry-run needs --data: a search that is resumed has its own plan")
    try:
        settings = given(
            options,
            SearchSettings,
            prefix="search_",
            backbone=given_backbone(options),
            **({"space": read_space(options.space)} if options.space else {}),
        )
        engine = given(options, EngineSettings, prefix="engine_")
    except SettingsError as error:
        parser.error(str(error))
    return Command(options=options, settings=settings, engine=engine)


def _search(command: Command) -> int:
    started = time.monotonic()
    options = command.options
    check_writable(options.summary)
    check_writable(options.progress)
    require("ray", "optuna", "sklearn", "pyarrow", "mlflow", "matplotlib", extra="tune")

    from tuning.records import SearchStore

    # Two people who start at the same second share a registry, and maybe a storage.
    fresh = f"apt-ray-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    name = options.resume or fresh
    store = SearchStore(options.storage, name)
    plan, categories = _planned(command, store)
    settings = plan.settings

    from apt_ray.registry import open_registry
    from tuning.outcome import Outcome
    from tuning.progress import say
    from tuning.report.tables import closing_table
    from tuning.runner import SearchStopped, run_search

    registry = open_registry(options.mlflow)
    registry.check()
    _connect(options.ray_address)
    provenance = _provenance()
    say(
        f"search {name}: {len(categories)} categories x {settings.trials} trials of"
        f" {settings.steps} steps, {settings.shots} shots; registry at {registry.address}"
    )
    say(f"if it is cut off: --storage {options.storage} --resume {name}")
    outcome, is_stopped = Outcome(), False
    try:
        run_search(
            categories,
            plan,
            command.engine,
            store,
            registry,
            provenance,
            outcome,
            progress=options.progress,
        )
    except SearchStopped:
        is_stopped = True
    seconds = time.monotonic() - started
    if outcome.tuned:
        print(f"\n{closing_table(outcome.tuned)}\n")
    say(f"{len(outcome.tuned)} of {len(categories)} categories registered in {seconds:.0f} s")
    for category, reason in outcome.failures.items():
        say(f"not registered: {category}: {reason}")
    status = 1 if outcome.failures else 0
    if options.summary:
        summary = {
            "search": name,
            "data": plan.data,
            "registry": registry.address,
            "settings": settings.model_dump(mode="json"),
            "provenance": provenance,
            "seconds": round(seconds, 2),
            "categories": [category.summary() for category in outcome.tuned]
            + [
                {"category": category, "status": "failed", "reason": reason}
                for category, reason in outcome.failures.items()
            ],
        }
        try:
            keep(options.summary, partial(write_json, value=summary))
        except WriteError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    if is_stopped:
        # Threads may still wait for a registry or a fit; nothing that they do is needed any more.
        sys.stdout.flush()
        os._exit(143)
    return status


def _estimate(command: Command) -> int:
    """Print what the search will take; nothing is searched, kept or registered."""
    check_writable(command.options.progress)
    require("ray", "optuna", "pyarrow", extra="tune")
    categories = find_categories(command.options.data, command.options.categories)

    from tuning.estimate import Machines, estimate
    from tuning.progress import say

    if command.options.ray_address or os.environ.get("RAY_ADDRESS"):
        _connect(command.options.ray_address)
        import ray

        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        machines = Machines(
            cpus=max(1, int(has.get("CPU", 1))), gpus=int(has.get("GPU", 0)), name="the cluster"
        )
    else:
        machines = Machines(cpus=os.cpu_count() or 1, gpus=0, name="this one")
    found = estimate(categories, command.settings, command.engine, machines, say=say)
    print(found)
    if command.options.progress:
        write_json(command.options.progress, {"estimate": found.summary()})
    return 0


def _planned(command: Command, store: "SearchStore") -> "tuple[SearchPlan, list[Category]]":
    """What is searched: as the command says, or as the search that is resumed has kept it."""
    from tuning.records import SearchPlan

    if command.options.resume:
        plan = store.plan()
        budget = {"time_budget_s": command.settings.time_budget_s}
        plan = plan.model_copy(update={"settings": plan.settings.model_copy(update=budget)})
        store.check_writable()
        return plan, find_categories(location(plan.data), plan.categories)
    data = command.options.data
    categories = find_categories(data, command.options.categories)
    names = tuple(category.name for category in categories)
    plan = SearchPlan.parse(
        {
            "data": str(data),
            "categories": names,
            "settings": command.settings,
            "past": _past(command, names) if command.settings.warm_start else {},
        }
    )
    store.create(plan)
    return plan, categories


def _past(command: Command, names: Sequence[str]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Where the categories begin beside the defaults."""
    from apt_ray.registry import open_registry
    from tuning.past import past_settings

    registry = open_registry(command.options.mlflow)
    registry.check()
    return past_settings(registry, names, command.settings)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuning/search.py",
        description="Search the best settings of each category with Ray Tune, fit its prompt set "
        "with them and register it in MLflow.",
    )
    data = parser.add_argument_group("images")
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
        help="search only these (all in DIR)",
    )
    search = parser.add_argument_group("search")
    add_flags(search, SearchSettings, prefix="search_", without={"space", "backbone"})
    search.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="YAML file with other settings to search, such as `smgs_weight: {low: 0, high: 1}`",
    )
    search.add_argument(
        "--storage",
        default="~/ray_results",
        metavar="DIR",
        help="where the state of the search is kept: a folder, on a cluster one that all nodes "
        "share, or s3:// (%(default)s)",
    )
    search.add_argument(
        "--dry-run",
        action="store_true",
        help="search nothing: time the parts of the search with the first category, and say what "
        "all of it will take on the Ray cluster, or on this machine where none is named",
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
        help="Ray cluster, or 'local' for one of its own (RAY_ADDRESS, which a job has)",
    )
    add_flags(cluster, EngineSettings, prefix="engine_")
    cluster.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow server that is the registry (MLFLOW_TRACKING_URI)",
    )
    cluster.add_argument(
        "--register-pending",
        action="store_true",
        help="search nothing; the same as `apt-ray registry pending`: register what earlier"
        " searches on this machine found while the registry was away",
    )
    cluster.add_argument(
        "--summary", type=Path, metavar="FILE", help="write what was found to this JSON file"
    )
    cluster.add_argument(
        "--progress",
        type=Path,
        metavar="FILE",
        help="keep how far it is in this JSON file, for programs that show it; with --dry-run what"
        " the search will take",
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
