"""`apt-ray doctor`: what is wrong here, and what mends it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from apt_ray.cli.common import WriteJson, add_command, add_json, writing_json
from apt_ray.cli.flags import number
from apt_ray.errors import SettingsError
from apt_ray.files import check_writable
from apt_ray.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apt_ray.doctor import Finding

_MARKS = {"ok": "ok", "skipped": "-", "warning": "WARNING", "error": "ERROR"}
_COLOURS = {"ok": "32", "skipped": "2", "warning": "33", "error": "31"}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = add_command(
        commands, "doctor", _run, "say what is wrong with this set-up, and what mends it"
    )
    doctor.description = (
        "Check Python, libraries, torch and GPU, weights, disks and ports of this machine, and Ray,"
        " MLflow, S3 and the fleet as far as they are named. Nothing is changed. Exit status: 0 if"
        " nothing is broken, whatever the warnings; 1 if something is."
    )
    doctor.add_argument(
        "--mlflow", metavar="URI", help="MLflow server (default: MLFLOW_TRACKING_URI)"
    )
    doctor.add_argument(
        "--fleet",
        metavar="URL",
        help="fleet, such as http://127.0.0.1:8000; APT_RAY_TOKEN may hold a token for it",
    )
    doctor.add_argument("--s3", metavar="s3://BUCKET/PREFIX", help="where images lie in S3")
    doctor.add_argument(
        "--http-port",
        type=number(int, least=1, most=65_535),
        default=8000,
        metavar="PORT",
        help="port on which a fleet listens, or is to listen, here (default %(default)s)",
    )
    doctor.add_argument(
        "--folder",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="further folder that is written to, such as a search's storage; may be repeated",
    )
    doctor.add_argument(
        "--only", metavar="CHECK,...", help="make these checks alone, such as ray,mlflow"
    )
    add_json(doctor, "write the findings as JSON", nargs="?", const=Path("-"))
    doctor.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.zip",
        help="also pack findings, versions, the fleet's state and logs, without secrets, for"
        " whoever helps",
    )
    doctor.add_argument(
        "--fleet-file", type=Path, metavar="FILE", help="fleet file to pack into the bundle"
    )
    doctor.add_argument(
        "--log",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="log, or folder of logs, to pack into the bundle (default: those of Serve on this"
        " machine); may be repeated",
    )


def _run(options: argparse.Namespace) -> int:
    with writing_json(options.json) as write:
        return _diagnose(options, write)


def _diagnose(options: argparse.Namespace, write: WriteJson) -> int:
    from apt_ray.doctor import CHECKS, Setup, diagnose

    only = [name.strip() for name in (options.only or "").split(",") if name.strip()]
    if unknown := sorted(set(only) - set(CHECKS)):
        raise SettingsError(
            f"there is no check {', '.join(unknown)}: choose among {', '.join(CHECKS)}"
        )
    check_writable(options.bundle)
    setup = Setup(
        mlflow=options.mlflow,
        fleet=options.fleet,
        s3=options.s3,
        port=options.http_port,
        folders=tuple(options.folder),
    )
    findings = diagnose(setup, only)
    broken = any(finding.level == "error" for finding in findings)
    write({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    _show(findings)
    if options.bundle is not None:
        from apt_ray.doctor.bundle import write_bundle

        names = write_bundle(
            options.bundle, findings, setup, fleet_file=options.fleet_file, logs=options.log
        )
        print(
            f"{options.bundle}: {len(names)} files; look through them before you send it",
            file=sys.stderr,
        )
    return int(broken)


def _show(findings: Sequence[Finding]) -> None:
    coloured = sys.stdout.isatty()
    wide = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark = f"{_MARKS[finding.level]:7}"
        if coloured:
            mark = f"\033[{_COLOURS[finding.level]}m{mark}\033[0m"
        print(f"{mark}  {finding.check:{wide}}  {printable(finding.what)}")
        if finding.remedy:
            print(f"{'':{wide + 11}}-> {printable(finding.remedy)}")
    levels = [finding.level for finding in findings]
    print(f"\n{levels.count('error')} errors, {levels.count('warning')} warnings")
