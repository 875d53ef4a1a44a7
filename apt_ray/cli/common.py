"""What the commands share: how one ends, their parsers' flags, progress bars.

Heavy modules are imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from tqdm import tqdm

from apt_ray.cli.flags import add_backbone_flags, add_flags, given, given_backbone
from apt_ray.config import FitSettings
from apt_ray.errors import AptError
from apt_ray.files import check_writable, keep, write_json
from apt_ray.tables import align
from apt_ray.text import printable

if TYPE_CHECKING:
    from apt_ray.data.folders import Defect
    from apt_ray.features.protocol import Backbone
    from apt_ray.prompts.confirm import Confirmation

WriteJson: TypeAlias = Callable[[object], None]
"""Writes the one value that `--json` asks for."""

_STANDARD_OUTPUT = Path("-")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it had begun is put in order."""


_PIPE_CLOSED = 141  # what a shell reports of a program that its reader ended, 128 + SIGPIPE


def run(command: Callable[[], int | None]) -> int:
    """Run a command, and return its exit status; None is 0.

    Errors of ours and of the world outside are one line on stderr and status 1. SIGTERM ends it as
    Ctrl-C does, with status 143, and a second one at once. A reader that goes
    away, such as `head`, ends the command without a word. What a terminal cannot show, such as a
    file name that is not UTF-8, is printed as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            status = command() or 0
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except _Terminated:
        return _end("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except BrokenPipeError:
        return _end("", _PIPE_CLOSED)
    except (AptError, OSError) as error:
        return _end(f"error: {error}", 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise, unless somebody takes note of it already."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(message: str, status: int) -> int:
    """Say why, as far as anybody listens; what is left to print must not fail when Python ends."""
    for stream, last in ((sys.stdout, ""), (sys.stderr, message)):
        try:
            print(last, end="\n" if last else "", file=stream, flush=True)
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    """Add the parser of a command; `run` takes the parsed options and returns the exit status."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def add_json(command: argparse.ArgumentParser, text: str, **options: Any) -> None:
    """Add `--json FILE`; `writing_json` writes it."""
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"{text}; - is standard output, and all else goes to standard error",
        **options,
    )


@contextmanager
def writing_json(file: Path | None) -> Iterator[WriteJson]:
    """What writes a value where `--json` says: to a file, to standard output, or, without it,
    nowhere. WriteError now, before any work, if the file cannot be written.

    Where it is standard output, the value alone stands there: whatever else is printed within the
    block goes to standard error.
    """
    if file is None:
        yield lambda value: None
    elif file == _STANDARD_OUTPUT:
        output = sys.stdout
        with redirect_stdout(sys.stderr):
            yield lambda value: print(json.dumps(value, indent=2), file=output, flush=True)
    else:
        check_writable(file)
        yield lambda value: keep(file, partial(write_json, value=value))


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of a fit; `settings` reads them."""
    group = command.add_argument_group("settings of the fit", "the defaults need no tuning")
    is_evaluation = command.prog.endswith("evaluate")  # which has seeds of its own
    add_flags(group, FitSettings, prefix="fit_", without={"seed"} if is_evaluation else ())


def settings(options: argparse.Namespace) -> FitSettings:
    """The settings of a fit that the flags gave."""
    return given(options, FitSettings, prefix="fit_")


def add_backbone(command: argparse.ArgumentParser) -> None:
    """Add the flags that choose the backbone and where it runs; `backbone` loads it."""
    add_backbone_flags(command)
    command.add_argument("--device", default="cpu", help="torch device (cpu)")


def backbone(options: argparse.Namespace) -> Backbone:
    """The backbone that the flags chose, loaded."""
    from apt_ray.features.clip import load_backbone

    loaded = load_backbone(given_backbone(options), device=options.device)
    if loaded.spec.tiles > 1:
        _print_cost_of_tiles(loaded)
    return loaded


def _print_cost_of_tiles(backbone: Backbone) -> None:
    import torch

    image = torch.zeros(1, 3, backbone.input_size, backbone.input_size)
    seconds = []
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        backbone.encode_images(image).tokens_BNE.cpu()
        seconds.append(time.perf_counter() - started)
    side = backbone.spec.tiles
    print(
        f"{side} x {side} tiles: an image of {backbone.input_size} px takes {side**2} passes of the"
        f" vision tower, {1000 * seconds[-1]:.0f} ms here"
    )


def print_confirmation(confirmation: Confirmation, defects: Sequence[Defect]) -> None:
    """Print what a prompt set has learned of confirmed defects, and what it knew of them."""
    prompt_set = confirmation.prompt_set
    rows = [
        (
            printable(defect.path),
            f"{score:.3f}",
            "rejected" if prompt_set.threshold.rejects(score) else "passes",
            defect.kind,
            name or "-",
        )
        for defect, score, name in zip(
            defects, confirmation.scores, confirmation.named, strict=True
        )
    ]
    print(align([("", "score", "verdict", "kind", "named by the others"), *rows]))
    kinds = ", ".join(f"{kind} ({count})" for kind, count in prompt_set.provenance.kinds.items())
    print(f"kinds and their examples: {kinds}")


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, as a callback that takes (done, total)."""
    with tqdm(desc=text, leave=False, disable=None) as shown:

        def show(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield show
