"""How a command ends that somebody else ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A command that is in the middle of writing a file.
# What runs in the background of a shell inherits that it ignores Ctrl-C.
_COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from apt_ray.cli.common import run
from apt_ray.files import writing

def command():
    with writing(sys.argv[1]) as place:
        place.write_text("half")
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("put in order", flush=True)
            if sys.argv[2:] == ["slowly"]:
                time.sleep(60)

sys.exit(run(command))
"""


def start(*arguments: str) -> "subprocess.Popen[str]":
    running = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    return running


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGINT, 130, "interrupted\n")],
)
def test_a_command_that_is_ended_leaves_nothing_half_written(
    number: signal.Signals, status: int, said: str, tmp_path: Path
) -> None:
    with start(str(tmp_path / "file")) as running:
        running.send_signal(number)
        out, err = running.communicate(timeout=10)
    assert (running.returncode, out, err) == (status, "put in order\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with start(str(tmp_path / "file"), "slowly") as running:
        assert running.stdout is not None
        running.terminate()
        assert running.stdout.readline() == "put in order\n"
        running.terminate()
        assert running.wait(10) == -signal.SIGTERM
