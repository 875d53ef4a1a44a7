"""The whole line on this machine, step by step, by the commands that a user types.

Sample images, a Ray cluster and an MLflow server, a search as a Ray job, a fleet, and an
inspection of a good and a defective part of each category.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.request import Request

from apt_ray.data.folders import Category, LabelledImage, find_categories
from apt_ray.devtools.local_stack import HOST, LocalStack, command_environment, fetch, free_ports
from apt_ray.errors import AptError
from apt_ray.files import Location

FOLDER = Path(".demo")
FLEET_PORT = 8000
SHOTS = 4
TRIALS = 8
_LINE_PARTS = (Path("tuning/search.py"), Path("serving/fleet.yaml"))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_ray.devtools.demo",
        description="Run apt-ray from sample images to a served anomaly map, on this machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run the whole line once and stop what it started"),
        ("up", "run the whole line and leave the servers up"),
        ("down", "stop the servers of `up`"),
    ):
        commands.add_parser(name, help=text, description=text)
    command = parser.parse_args(argv).command

    stack = LocalStack(FOLDER)
    try:
        if command == "down":
            print(f"stopped: {', '.join(stack.stop()) or 'nothing was running'}")
        else:
            with _running(stack, keep=command == "up"):
                _run_line(stack)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def _running(stack: LocalStack, *, keep: bool) -> Iterator[None]:
    """A fresh demo folder, whose servers are stopped in the end unless all went well and `keep`."""
    if missing := [str(path) for path in _LINE_PARTS if not path.exists()]:
        raise AptError(f"{Path.cwd()} has no {missing[0]}: run the demo in the repository's root")
    if stack.is_running:
        raise AptError("the demo's servers are already up: `make down` stops them")
    stack.stop()
    shutil.rmtree(FOLDER, ignore_errors=True)

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if not (succeeded and keep):
            print(f"stopped: {', '.join(stack.stop()) or 'nothing was running'}", flush=True)


def _run_line(stack: LocalStack) -> None:
    begin = time.monotonic()
    data = FOLDER / "data"
    _run("python", "-m", "apt_ray", "sample", "--out", str(data))

    print("\nstarting Ray and MLflow ...", flush=True)
    stack.start()
    print(f"$ source {FOLDER}/env", flush=True)
    _submit_search(stack, data.absolute())

    port = _fleet_port()
    fleet_url = f"http://{HOST}:{port}"
    _run(
        *("python", "-m", "serving.fleet", "deploy", "serving/fleet.yaml"),
        *("--http-port", str(port)),
        environment=stack.environment,
    )
    _inspect(fleet_url, find_categories(data))

    print(f"\nthe whole line took {time.monotonic() - begin:.0f} s\n")
    addresses = {server.name: server.url for server in stack.servers} | {"fleet": fleet_url}
    for name, url in addresses.items():
        print(f"{name:8}{url}")
    print(f"Ray's dashboard asks for the token in {FOLDER}/ray_token", flush=True)


def _fleet_port() -> int:
    """That of the documents' examples, or a free one where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, FLEET_PORT))
        except OSError:
            return free_ports(1)[0]
    return FLEET_PORT


def _submit_search(stack: LocalStack, data: Path) -> None:
    submission_id = f"demo-{uuid.uuid4().hex[:8]}"
    _run(
        *("ray", "job", "submit", "--submission-id", submission_id, "--working-dir", ".", "--"),
        *("python", "tuning/search.py", "--data", str(data)),
        # Judging by three support sets is worth its minutes where the winner is to be used.
        *("--shots", str(SHOTS), "--trials", str(TRIALS), "--seeds", "0"),
        *("--storage", str(data.with_name("search"))),
        environment=stack.environment,
        # The client's exit code says nothing of the job's when its view of the log breaks off.
        check=False,
    )
    job = stack.wait_for_job(submission_id)
    if job["status"] != "SUCCEEDED":
        raise AptError(
            f"the search has {job['status'].lower()} with exit code {job['driver_exit_code']}:"
            " its output above says why"
        )


def _inspect(fleet_url: str, categories: list[Category]) -> None:
    """Ask the fleet about a good part and one of each kind of defect, of each category."""
    rows = []
    of_good, of_defective = list[bool](), list[bool]()
    print()
    for category in categories:
        url = f"{fleet_url}/v1/{category.name}/inspect"
        verdicts = {
            image: json.loads(_ask(url, image.path)) for image in _one_of_each_kind(category)
        }
        for image, verdict in verdicts.items():
            rows.append(_row(category.name, image.defect_type, verdict))
            (of_defective if image.is_anomalous else of_good).append(verdict["is_anomalous"])
        worst = max(
            (image for image in verdicts if image.is_anomalous),
            key=lambda image: float(verdicts[image]["anomaly_score"]),
        )
        _ask(url, worst.path, overlay=FOLDER / f"overlay-{category.name}.png")
    header = ("category", "part", "score", "threshold", "verdict", "p-value", "version")
    print()
    for row in (header, *rows):
        print("  ".join(f"{cell:14}" for cell in row).rstrip())
    print(
        f"\n{sum(of_defective)} of {len(of_defective)} defects found, {sum(of_good)} of"
        f" {len(of_good)} good parts rejected\noverlays of the defects that scored highest:"
        f" {FOLDER}/overlay-*.png",
        flush=True,
    )


def _one_of_each_kind(category: Category) -> list[LabelledImage]:
    """The first good test image, and the first of each type of defect."""
    first: dict[str, LabelledImage] = {}
    for image in category.test:
        first.setdefault(image.defect_type, image)
    return sorted(first.values(), key=lambda image: (image.is_anomalous, image.defect_type))


def _row(category: str, part: str, verdict: Mapping[str, Any]) -> tuple[str, ...]:
    p_value = verdict["p_value"]
    return (
        category,
        part,
        f"{verdict['anomaly_score']:.3f}",
        f"{verdict['threshold']:.3f}",
        "ANOMALOUS" if verdict["is_anomalous"] else "normal",
        "-" if p_value is None else f"{p_value:.3f}",
        str(verdict["version"]),
    )


def _ask(url: str, image: Location, *, overlay: Path | None = None) -> bytes:
    """Send an image as the `curl` command does that is shown: curl itself may not be there."""
    options = () if overlay is None else ("-H", "Accept: image/png", "-o", str(overlay))
    shown = os.path.relpath(str(image))
    print(f"$ {shlex.join(['curl', *options, '--data-binary', f'@{shown}', url])}", flush=True)
    headers = {} if overlay is None else {"Accept": "image/png"}
    answer = fetch(Request(url, data=image.read_bytes(), headers=headers))
    if overlay is not None:
        overlay.write_bytes(answer)
    return answer


def _run(*command: str, environment: Mapping[str, str] | None = None, check: bool = True) -> None:
    """Show a command and run it; AptError if `check` and it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = {**command_environment(), **(environment or {})}
    code = subprocess.run(command, env=environment, check=False).returncode
    if check and code:
        raise AptError(f"`{shlex.join(command[:4])} ...` failed with exit code {code}: see above")


if __name__ == "__main__":
    sys.exit(main())
