"""Deploy the fleet that a fleet file describes, look at it, decide what it serves, take it down."""

import argparse
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apt_ray.errors import AptError
from apt_ray.optional import require
from serving.settings import Fleet

if TYPE_CHECKING:
    from apt_ray.registry import Registry


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "force", False) and not arguments.reason:
        parser.error("--force needs --reason TEXT: the history keeps why")
    try:
        if "ray_address" in arguments:
            require("ray", "fastapi", "python_multipart", "mlflow", extra="serve")
        code: int | None = arguments.run(arguments)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code or 0


def _deploy_command(arguments: argparse.Namespace) -> None:
    fleet = Fleet.read(arguments.file)
    # Ray and MLflow take seconds to import: not for --help or a misspelt file.
    from apt_ray.registry import Registry
    from serving.deploy.cluster import Cluster
    from serving.deploy.deployment import deploy
    from serving.deploy.plan import HttpAddress, check_exposure

    address = HttpAddress(host=arguments.host, port=arguments.http_port)
    check_exposure(fleet, address)
    tracking_uri = arguments.mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    registry = Registry(tracking_uri)
    registry.check()
    categories = deploy(
        fleet,
        cluster=Cluster(arguments.ray_address),
        registry=registry,
        tracking_uri=tracking_uri,
        address=address,
        timeout_s=arguments.timeout,
        progress=_say,
    )
    pages = {"console": "/", "API": "/docs"}
    routes = {category: f"/v1/{category}/inspect" for category in categories}
    width = max(map(len, pages | routes))
    for name, path in (pages | routes).items():
        print(f"{name:{width}}  {address.url}{path}")


def _status_command(arguments: argparse.Namespace) -> None:
    from serving.deploy.cluster import Cluster
    from serving.deploy.deployment import describe_status

    cluster = Cluster(arguments.ray_address)
    details = cluster.serve_details()
    lines = describe_status(details, cluster.fleet_status() if details.applications else None)
    print("\n".join(lines) or "no fleet is deployed")


def _down_command(arguments: argparse.Namespace) -> None:
    from serving.deploy.cluster import Cluster
    from serving.deploy.deployment import take_down

    print(f"stopped {take_down(Cluster(arguments.ray_address))} applications")


def _token_command(arguments: argparse.Namespace) -> None:
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    _say("give this token to the caller; it is not stored anywhere:")
    print(token)
    _say("add this to the list `tokens` under `auth` in the fleet file, then deploy:")
    scopes = ", ".join(arguments.scope or ["inspect"])
    _say(f"    - {{name: {arguments.name}, sha256: {digest}, scopes: [{scopes}]}}")


def _promote_command(arguments: argparse.Namespace) -> int:
    from apt_ray.data.folders import find_categories
    from apt_ray.registry import promote
    from apt_ray.validation.versions import compare_prompt_sets

    normal: Sequence[Path] = ()
    if arguments.data is not None:
        (found,) = find_categories(arguments.data, [arguments.category])
        normal = found.good
    promotion = promote(
        _registry(arguments),
        arguments.category,
        arguments.version,
        normal=normal,
        force=arguments.reason if arguments.force else None,
        compare=partial(compare_prompt_sets, progress=_show_progress),
    )
    print(promotion.report())
    return 0 if promotion.move else 3


def _rollback_command(arguments: argparse.Namespace) -> None:
    from apt_ray.registry import roll_back

    move = roll_back(_registry(arguments), arguments.category, why=arguments.reason)
    print(f"{arguments.category}: version {move.source} -> {move.target}")


def _history_command(arguments: argparse.Namespace) -> None:
    history = _registry(arguments).history(arguments.category)
    rows = [
        (
            move.at or "-",
            move.who or "-",
            move.action,
            f"{move.source or '-'} -> {move.target}",
            move.why,
        )
        for move in history.moves
    ]
    _print_table(("when", "who", "what", "version", "why"), rows)


def _diff_command(arguments: argparse.Namespace) -> None:
    differences = _registry(arguments).diff(arguments.category, arguments.left, arguments.right)
    rows = [(name, left or "-", right or "-") for name, left, right in differences]
    _print_table(("", arguments.left, arguments.right), rows)


def _prune_command(arguments: argparse.Namespace) -> None:
    from apt_ray.registry import prune

    pruned = prune(
        _registry(arguments),
        arguments.categories,
        keep=arguments.keep,
        days=arguments.days,
        dry_run=not arguments.yes,
    )
    for version in pruned:
        print(f"{version.category}: version {version.version}")
    _say(
        f"{len(pruned)} versions deleted; `mlflow gc` on the server frees their space"
        if arguments.yes
        else f"{len(pruned)} versions would be deleted; with --yes they are"
    )


def _registry(arguments: argparse.Namespace) -> "Registry":
    from apt_ray.registry import Registry

    return Registry(arguments.mlflow)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rcomparing on held-out pictures: {done} of {total}", end=end, file=sys.stderr)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _add_registry_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verbs that only speak to the registry; a running fleet follows it."""
    promote = commands.add_parser(
        "promote",
        help="let the candidate serve if it beats the champion",
        description="Compare the candidate with the champion on perturbed good pictures that"
        " neither was fitted to, and let it serve if it is better by more than 2 standard errors"
        " and by no kind of perturbation 2 points worse. Exit code: 0 if it serves now, 3 if not.",
    )
    promote.add_argument("category")
    promote.add_argument(
        "--version",
        default="candidate",
        metavar="ALIAS|N",
        help="what to promote (default: %(default)s)",
    )
    promote.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of categories with more good pictures to compare on",
    )
    promote.add_argument(
        "--force", action="store_true", help="promote whatever the verdict is; needs --reason"
    )
    promote.add_argument("--reason", metavar="TEXT", help="why it is forced; kept in the history")
    promote.set_defaults(run=_promote_command)

    rollback = commands.add_parser(
        "rollback", help="let the version serve that served before; again goes one further"
    )
    rollback.add_argument("category")
    rollback.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")
    rollback.set_defaults(run=_rollback_command)

    history = commands.add_parser("history", help="who let which version serve, when and why")
    history.add_argument("category")
    history.set_defaults(run=_history_command)

    diff = commands.add_parser("diff", help="what differs between two versions")
    diff.add_argument("category")
    diff.add_argument("left", nargs="?", default="champion", metavar="ALIAS|N")
    diff.add_argument("right", nargs="?", default="candidate", metavar="ALIAS|N")
    diff.set_defaults(run=_diff_command)

    prune = commands.add_parser(
        "prune",
        help="delete versions that nobody needs",
        description="Delete versions from the registry, except those with an alias, the newest of"
        " each category, and what served lately. Without --yes it only says which.",
    )
    prune.add_argument("categories", nargs="*", metavar="CATEGORY", help="whose (default: all)")
    prune.add_argument(
        "--keep", type=int, default=5, metavar="N", help="newest to keep (default %(default)s)"
    )
    prune.add_argument(
        "--days",
        type=float,
        default=90,
        metavar="D",
        help="keep what served in the last D days (default %(default)s)",
    )
    prune.add_argument("--yes", action="store_true", help="delete them")
    prune.set_defaults(run=_prune_command)

    for command in (promote, rollback, history, diff, prune):
        command.add_argument(
            "--mlflow",
            metavar="URI",
            help="address of the MLflow server (default: MLFLOW_TRACKING_URI)",
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.fleet",
        description="Serve the registry's prompt sets over HTTP, on a running Ray cluster.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    deploy_parser = commands.add_parser(
        "deploy",
        help="make the cluster serve what a fleet file describes",
        description="Make the cluster serve exactly what a fleet file describes: one application"
        " with replicas of its own per category, and a web page. What does not change keeps"
        " running. Run it on a machine of the cluster, in an environment like that of its nodes.",
    )
    deploy_parser.add_argument("file", type=Path, help="the fleet file, e.g. serving/fleet.yaml")
    deploy_parser.add_argument(
        "--http-port", type=int, default=8000, help="port to listen on (default %(default)s)"
    )
    deploy_parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default %(default)s: only this machine can ask); any other,"
        " such as 0.0.0.0, needs tokens in the fleet file",
    )
    deploy_parser.add_argument(
        "--mlflow",
        metavar="URI",
        help="address of the MLflow server, as the cluster's nodes reach it (default:"
        " MLFLOW_TRACKING_URI)",
    )
    deploy_parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait until all is ready (default %(default)s)",
    )
    deploy_parser.set_defaults(run=_deploy_command)

    status_parser = commands.add_parser("status", help="show what is served and how it is doing")
    status_parser.set_defaults(run=_status_command)
    down_parser = commands.add_parser("down", help="stop serving")
    down_parser.set_defaults(run=_down_command)
    for command in (deploy_parser, status_parser, down_parser):
        command.add_argument(
            "--ray-address",
            default="auto",
            metavar="ADDRESS",
            help="the Ray cluster: host:port of its head, or 'auto', which takes RAY_ADDRESS or the"
            " cluster of this machine (default)",
        )

    _add_registry_commands(commands)

    token_parser = commands.add_parser(
        "token",
        help="make a token for a caller",
        description="Make a token that lets a caller use the fleet, and its entry for the fleet"
        " file, which holds only its hash.",
    )
    token_parser.add_argument("name", help="who will use it, e.g. line-3")
    token_parser.add_argument(
        "--scope",
        action="append",
        metavar="SCOPE",
        help="what it is good for: inspect (default), inspect:CATEGORY or operate; may be repeated",
    )
    token_parser.set_defaults(run=_token_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
