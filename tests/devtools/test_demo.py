import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from apt_ray.data.samples.factory import SAMPLE_CATEGORIES
from apt_ray.devtools.local_stack import LocalStack

ROOT = Path(__file__).resolve().parents[2]


def demo(folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """Run the demo of the packages that lie in `folder`, or of those installed, there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "apt_ray.devtools.demo", command],
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


@pytest.fixture
def stub_repository(tmp_path: Path) -> Path:
    """A folder in which the demo runs, with a search to be filled in."""
    for name in ("tuning", "serving"):
        (tmp_path / name).mkdir()
    (tmp_path / "serving/fleet.yaml").touch()
    return tmp_path


def test_failed_search_ends_the_line_and_its_servers(stub_repository: Path) -> None:
    (stub_repository / "tuning/search.py").write_text("raise SystemExit(7)")
    failed = demo(stub_repository, "up")
    assert failed.returncode == 1
    assert "the search has failed with exit code 7" in failed.stderr
    assert failed.stdout.endswith("stopped: MLflow, Ray\n")
    assert not (stub_repository / ".demo/state.json").exists()


@pytest.mark.slow
def test_interrupted_line_ends_its_servers(stub_repository: Path) -> None:
    begun = stub_repository / "begun"
    (stub_repository / "tuning/search.py").write_text(
        f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    )
    command = [sys.executable, "-m", "apt_ray.devtools.demo", "run"]
    with subprocess.Popen(command, cwd=stub_repository, stdout=subprocess.DEVNULL) as line:
        while not begun.exists():
            assert line.poll() is None
            time.sleep(0.2)
        servers = LocalStack(stub_repository / ".demo").servers
        assert all(server.is_running for server in servers)
        line.terminate()
    assert line.returncode == 143
    assert not any(server.is_running for server in servers)


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
            good, *defective = rows
            assert good[1] == "good"
            assert len(defective) >= 3
            assert float(good[2]) < max(float(row[2]) for row in defective)
            with Image.open(tmp_path / f".demo/overlay-{category}.png") as overlay:
                overlay.load()
    finally:
        stopped = demo(tmp_path, "down")
    assert stopped.stdout.startswith("stopped: ")
    assert not LocalStack(tmp_path / ".demo").is_running
