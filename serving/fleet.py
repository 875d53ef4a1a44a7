"""Deploy the fleet that a fleet file describes, look at it, decide what it serves, take it down."""

import argparse
import hashlib
import math
import os
import secrets
import sys
from pathlib import Path

import yaml

from apt_ray.cli.common import run
from apt_ray.cli.flags import number
from apt_ray.cli.registry import add_verbs
from apt_ray.machine import settle
from apt_ray.optional import require
from serving.settings import ApiToken, Fleet


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    settle()

    def command() -> int | None:
        if "ray_address" in arguments or arguments.run is _render_command:
            require("ray", "fastapi", "python_multipart", "mlflow", extra="serve")
        code: int | None = arguments.run(arguments)
        return code

    return run(command)


def _deploy_command(arguments: argparse.Namespace) -> None:
    fleet = Fleet.read(arguments.file)
    # Ray and MLflow take seconds to import: not for --help or a misspelt file.
    from apt_ray.registry import open_registry
    from serving.deploy.cluster import Cluster
    from serving.deploy.deployment import deploy
    from serving.deploy.plan import HttpAddress, check_exposure

    address = HttpAddress(host=arguments.host, port=arguments.http_port)
    check_exposure(fleet, address)
    tracking_uri = arguments.mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    registry = open_registry(tracking_uri)
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


def _render_command(arguments: argparse.Namespace) -> None:
    fleet = Fleet.read(arguments.file)
    from apt_ray.registry import open_registry
    from serving.deploy.deployment import resolve
    from serving.deploy.kubernetes import demand, render
    from serving.deploy.plan import pools_of

    tracking_uri = arguments.mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    registry = open_registry(tracking_uri)
    if isinstance(fleet.categories, dict):
        entries, absent = fleet.categories, dict[str, str]()
    else:
        registry.check()
        entries, absent = resolve(fleet, registry)
    pools = pools_of(fleet, entries)
    text = render(fleet, pools, tracking_uri=tracking_uri, gpus=arguments.gpu)
    for name, reason in absent.items():
        _say(f"left out: {name}: {reason}")
    _say(demand(pools, gpus=arguments.gpu))
    print(text, end="")


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
    entry = {
        "name": arguments.name,
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "scopes": arguments.scope or ["inspect"],
    }
    ApiToken.parse(entry)  # or the fleet file would refuse it
    line = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=math.inf)
    _say("give this token to the caller; it is not stored anywhere:")
    print(token)
    _say("add this to the list `tokens` under `auth` in the fleet file, then deploy:")
    _say(f"    - {line.strip()}")


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
        "--http-port",
        type=number(int, least=1, most=65_535),
        default=8000,
        metavar="PORT",
        help="port to listen on (default %(default)s)",
    )
    deploy_parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default %(default)s: only this machine can ask); any other,"
        " such as 0.0.0.0, needs tokens in the fleet file",
    )
    deploy_parser.add_argument(
        "--timeout",
        type=number(float),
        default=300,
        metavar="SECONDS",
        help="how long to wait until all is ready (default %(default)s)",
    )
    deploy_parser.set_defaults(run=_deploy_command)

    render_parser = commands.add_parser(
        "render",
        help="print a fleet file as KubeRay takes it",
        description="Print what a fleet file decides of a RayService, as a patch for the overlays"
        " of serving/kubernetes: Serve's configuration is the one that `deploy` would make. No"
        " cluster is needed, and the registry is asked only for `categories: all`.",
    )
    render_parser.add_argument("file", type=Path, help="the fleet file; it needs tokens")
    device = render_parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--cpu", action="store_true", help="for worker pods without GPUs")
    device.add_argument("--gpu", action="store_true", help="for worker pods with GPUs")
    render_parser.set_defaults(run=_render_command)

    status_parser = commands.add_parser("status", help="show what is served and how it is doing")
    status_parser.set_defaults(run=_status_command)
    down_parser = commands.add_parser("down", help="stop serving")
    down_parser.set_defaults(run=_down_command)
    for command in (deploy_parser, render_parser):
        command.add_argument(
            "--mlflow",
            metavar="URI",
            help="address of the MLflow server, as the cluster's nodes reach it (default:"
            " MLFLOW_TRACKING_URI)",
        )
    for command in (deploy_parser, status_parser, down_parser):
        command.add_argument(
            "--ray-address",
            default="auto",
            metavar="ADDRESS",
            help="the Ray cluster: host:port of its head, or 'auto', which takes RAY_ADDRESS or the"
            " cluster of this machine (default)",
        )

    add_verbs(commands)  # the same as those of `apt-ray registry`

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
