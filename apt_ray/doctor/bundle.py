"""The support bundle: what whoever helps needs to know, without secrets, in one ZIP file."""

import io
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import apt_ray
from apt_ray.doctor.findings import Finding, Setup
from apt_ray.doctor.http import Unanswered, ask, bearer
from apt_ray.doctor.machine import installed
from apt_ray.doctor.redaction import Redactor, is_secret
from apt_ray.doctor.servers import FLEET_TOKEN
from apt_ray.errors import DataError, SettingsError
from apt_ray.files import StrPath, write_whole
from apt_ray.settings_file import read_settings

_ENVIRONMENT = (
    "APT_RAY_", "RAY_", "MLFLOW_", "AWS_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "TORCH_", "HF_",
    "XDG_", "PYTHON", "SSL_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY",
    "NO_PROXY", "HOME", "TMPDIR", "LANG", "LC_", "TZ", "VIRTUAL_ENV",
)  # fmt: skip
_LINES = 2000
_LOG_BYTES = 2 * 2**20
_LOG_FILES = 50
_LOG_SUFFIXES = (".log", ".out", ".err", ".txt", ".json", ".jsonl")
_RAY_LOGS = Path("/tmp/ray/session_latest/logs/serve")
_READ_ME = """What `apt-ray doctor --bundle` found, for whoever helps. Look through it first.

doctor.json        the findings, each with its remedy
system.json        this machine and the variables of the environment that matter
libraries.txt      every library with its version
fleet-status.json  what the fleet says of itself, if one was named and let us ask
fleet-file.yaml    the fleet file, if one was named
logs/              the last {lines} lines of each log

Secrets are replaced by [redacted ....]; equal digits stand for equal secrets. No images are in it.
Names of categories, of tokens, of hosts and users, and paths of files are.
"""


def write_bundle(
    path: StrPath,
    findings: Sequence[Finding],
    setup: Setup,
    *,
    fleet_file: Path | None = None,
    logs: Sequence[Path] = (),
) -> list[str]:
    """Write the bundle, and return the names of the files in it.

    Args:
        findings: what the checks found.
        setup: what they were told.
        fleet_file: of the fleet that there is trouble with.
        logs: files, or folders of them; Ray's own of this machine where none are named.

    Raises:
        WriteError: It cannot be written; nothing is left behind.
        DataError: A log that was named cannot be read.
        SettingsError: The fleet file is no YAML.
    """
    redact = Redactor()
    parts: dict[str, Callable[[], str]] = {
        "README.txt": lambda: _READ_ME.format(lines=_LINES),
        "doctor.json": lambda: _json([asdict(finding) for finding in findings], redact),
        "system.json": lambda: _json(_system(redact), redact),
        "libraries.txt": lambda: "".join(f"{name}=={v}\n" for name, v in installed()),
    }
    if setup.fleet:
        parts["fleet-status.json"] = lambda: _json(_fleet_status(setup.fleet or ""), redact)
    if fleet_file is not None:
        parts["fleet-file.yaml"] = lambda: _fleet_file(fleet_file, redact)
    files = {name: make() for name, make in parts.items()}
    for number, log in enumerate(_log_files(logs), 1):
        files[f"logs/{number:02}-{log.name}"] = redact(_last_lines(log, is_named=bool(logs)))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text.encode("utf-8", "backslashreplace"))
    write_whole(path, content.getvalue(), private=True)
    return list(files)


def _json(value: object, redact: Redactor) -> str:
    return json.dumps(_clean(value, redact), indent=2, ensure_ascii=False) + "\n"


def _clean(value: Any, redact: Redactor, name: str = "") -> Any:
    """The same, each text and each value of a secret's name redacted."""
    if isinstance(value, dict):
        return {str(key): _clean(one, redact, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one, redact, name) for one in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) or is_secret(name):
        return redact.value(name, str(value))
    return value


def _system(redact: Redactor) -> dict[str, object]:
    names = sorted(name for name in os.environ if name.startswith(_ENVIRONMENT))
    return {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "apt-ray": apt_ray.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "user": os.getuid(),
        "environment": {name: os.environ[name] for name in names},
    }


def _fleet_status(url: str) -> object:
    token = os.environ.get(FLEET_TOKEN, "").strip()
    try:
        answer = ask(f"{url.rstrip('/')}/fleet/status", bearer(token) if token else None)
    except Unanswered as failure:
        return {"unanswered": str(failure)}
    told = answer.json()
    return told if told is not None else {"status": answer.status, "said": answer.said}


def _fleet_file(path: Path, redact: Redactor) -> str:
    try:
        values = read_settings(path, "fleet file")
    except SettingsError:
        # That it cannot be read may be the trouble.
        return redact(_last_lines(path, is_named=True))
    text: str = yaml.safe_dump(_clean(values, redact), sort_keys=False, allow_unicode=True)
    return redact(text)


def _log_files(named: Sequence[Path]) -> Iterator[Path]:
    """The newest first, each once."""
    found: dict[Path, float] = {}
    for place in named or [_RAY_LOGS]:
        if place.is_dir():
            files = [f for f in place.rglob("*") if f.suffix in _LOG_SUFFIXES and f.is_file()]
        elif named:
            files = [place]
        else:
            files = []
        for file in files:
            try:
                found[file.resolve()] = file.stat().st_mtime
            except OSError as error:
                raise DataError(
                    f"cannot read {file} ({error.strerror}): name another log"
                ) from None
    yield from sorted(found, key=lambda file: -found[file])[:_LOG_FILES]


def _last_lines(path: Path, *, is_named: bool) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - _LOG_BYTES)
            file.seek(begin)
            lines = file.read().decode("utf-8", "replace").splitlines(keepends=True)
    except OSError as error:
        if is_named:
            raise DataError(f"cannot read {path} ({error.strerror}): name another log") from None
        return f"cannot be read: {error.strerror}\n"
    # A line whose beginning is cut off may hide what would show a secret for one.
    return "".join(lines[1 if begin else 0 :][-_LINES:])
