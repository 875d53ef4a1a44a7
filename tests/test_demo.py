import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from apt_ray.data.samples import SAMPLE_CATEGORIES
from apt_ray.local_stack import LocalStack

ROOT = Path(__file__).resolve().parents[1]


def demo(folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """Run the demo of the packages that lie in `folder`, or of those installed, there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "apt_ray.demo", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_down_without_servers_says_so(tmp_path: Path) -> None:
    ended = demo(tmp_path, "down")
    assert (ended.returncode, ended.stdout) == (0, "stopped: nothing was running\n")


def test_outside_of_the_repository_nothing_is_begun(tmp_path: Path) -> None:
    refused = demo(tmp_path, "run")
    assert refused.returncode == 1
    assert "run the demo in the repository's root" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["sample", "deploy"])
def test_failure_of_a_step_ends_the_line_and_its_servers(tmp_path: Path, broken: str) -> None: ...


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_line_from_pictures_to_overlays(tmp_path: Path) -> None:
    for package in ("apt_ray", "tuning", "serving"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for name in ("pyproject.toml", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)

    done = demo(tmp_path, "up")
    stack = LocalStack(tmp_path / ".demo")
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert stack.is_running
        for category in SAMPLE_CATEGORIES:
            rows = [line.split() for line in done.stdout.splitlines() if line.startswith(category)]
            good, defective = rows
            assert good[1] == "good"
            assert float(good[2]) < float(defective[2])
            with Image.open(tmp_path / f".demo/overlay-{category}.png") as overlay:
                overlay.load()
    finally:
        stopped = demo(tmp_path, "down")
    assert stopped.stdout.startswith("stopped: ")
    assert not LocalStack(tmp_path / ".demo").is_running
