"""A finding, what checks are told, and how they are made: side by side, each within its time."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Level = Literal["ok", "skipped", "warning", "error"]

_LIMIT_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        level: `ok`; `skipped`, since what it would look at is not set; `warning`, it works and may
            not for long, or not safely; `error`, it does not work.
        what: is the case.
        remedy: what to do about it; empty where there is nothing to do.
    """

    level: Level
    what: str
    remedy: str = ""
    check: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is to be looked at beside what the environment names.

    Attributes:
        mlflow: address of the MLflow server; None reads MLFLOW_TRACKING_URI.
        fleet: address of the fleet, None if there is none to be asked.
        s3: a bucket or a prefix in it, `s3://...`; None if there is none.
        port: where a fleet listens, or is to listen, on this machine.
        folders: further folders that are written to.
        free_gib: what each disk should have left.
    """

    mlflow: str | None = None
    fleet: str | None = None
    s3: str | None = None
    port: int = 8000
    folders: tuple[Path, ...] = ()
    free_gib: float = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at; it changes nothing.

    Attributes:
        look: yields what it finds; `Finding.check` is filled in.
        limit_s: how long it may take.
    """

    look: Callable[[Setup], Iterable[Finding]]
    limit_s: float = _LIMIT_S


def side_by_side(checks: Mapping[str, Check], setup: Setup) -> list[Finding]:
    """What all checks find, in their order. One that hangs or fails is a finding itself."""
    found: dict[str, list[Finding]] = {name: [] for name in checks}

    def look(name: str, check: Check) -> None:
        try:
            for finding in check.look(setup):
                found[name].append(replace(finding, check=name))
        except Exception as error:
            what = f"the check itself failed: {type(error).__name__}: {error}"
            found[name].append(
                Finding(level="error", what=what, remedy="report this as a bug", check=name)
            )

    # Daemons, since what hangs cannot be ended, and must not keep the program.
    threads = {
        name: threading.Thread(target=look, args=(name, check), daemon=True)
        for name, check in checks.items()
    }
    started = time.monotonic()
    for thread in threads.values():
        thread.start()
    result = []
    for name, thread in threads.items():
        limit_s = checks[name].limit_s
        thread.join(max(0.0, started + limit_s - time.monotonic()))
        result += found[name]
        if thread.is_alive():
            what = f"no answer within {limit_s:g} s"
            remedy = "look at what it asks: it hangs, or this machine is overloaded"
            result.append(Finding(level="error", what=what, remedy=remedy, check=name))
    return result


def ok(what: str) -> Finding:
    return Finding(level="ok", what=what)


def skipped(what: str, remedy: str = "") -> Finding:
    return Finding(level="skipped", what=what, remedy=remedy)


def warning(what: str, remedy: str) -> Finding:
    return Finding(level="warning", what=what, remedy=remedy)


def error(what: str, remedy: str) -> Finding:
    return Finding(level="error", what=what, remedy=remedy)
