"""tuning: the search as a person runs it, in processes of its own on a real Ray."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from apt_ray.config import FitSettings
from apt_ray.errors import DataError
from apt_ray.local_stack import LocalStack, command_environment, free_ports
from apt_ray.registry import Registry
from tuning.results import TrialRecord, choose_winner
from tuning.space import SEARCHED, search_space, starting_point

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--shots", "2", "--seeds", "0", "--steps", "8")


def run_search(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuning.search", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    stack = LocalStack(tmp_path_factory.mktemp("search") / "stack")
    stack.start()
    yield stack
    stack.stop()


def submit(stack: LocalStack, *arguments: object) -> str:
    """Run the search as a job; returns what `ray job submit` printed."""
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "tuning/search.py"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=command_environment() | stack.environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout


@pytest.mark.timeout(600)
def test_job_keeps_what_succeeded_beside_a_broken_category(
    stack: LocalStack, sample_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_data / "blister", data / "blister")
    shutil.copytree(sample_data / "washer", data / "washer")
    for picture in (data / "blister" / "train" / "good").iterdir():
        picture.write_bytes(picture.read_bytes()[:200])
    tracking_uri = stack.environment["MLFLOW_TRACKING_URI"]
    summary_file = tmp_path / "summary.json"

    log = submit(
        stack,
        *(*QUICK, "--seeds", "0,1", "--trials", "3", "--data", data, "--mlflow", tracking_uri),
        *("--storage", tmp_path / "ray", "--summary", summary_file),
    )

    assert "failed with exit code 1" in log, log
    assert "Traceback" not in log
    assert re.search(r"\[2/2\] washer: 3 of 3 trials, best \d\.\d+ ± \d\.\d+", log)
    assert re.search(r"not registered: blister: .*blister/train/good/\S+ is damaged", log)
    assert re.search(r"^category +context .*\nwasher .* 1 +\d+$", log, re.MULTILINE)

    registry = Registry(tracking_uri)
    assert registry.champions() == {"washer": 1}
    prompt_set, version = registry.load("washer")
    assert version.tags["ray.submission_id"] in log

    pictures = MlflowClient(tracking_uri).list_artifacts(version.run_id, "version/pictures")
    assert [Path(picture.path).stem for picture in pictures] == [
        "held_out_perturbations",
        "support_images",
        "trials",
    ]

    washer, blister = json.loads(summary_file.read_text())["categories"]
    assert blister["category"] == "blister"
    assert blister["status"] == "failed"
    assert "is damaged" in blister["reason"]
    assert (washer["status"], washer["version"]) == ("registered", 1)
    assert FitSettings(**washer["settings"]) == prompt_set.settings
    assert washer["metrics"] == prompt_set.metrics
    assert washer["support_hash"] == prompt_set.support_hash
    assert 0 <= washer["metrics"]["held_out"] <= 1
    assert len(washer["trials"]) == 3
    winners = [
        trial for trial in washer["trials"] if trial["held_out"] == washer["metrics"]["held_out"]
    ]
    assert winners[0]["steps"] == prompt_set.settings.steps == 8
    assert all(winners[0][name] == washer["settings"][name] for name in SEARCHED)


def test_private_ray_and_a_single_shot(
    sample_data: Path, mlflow_server: str, tmp_path: Path
) -> None:
    done = run_search(
        *("--ray-address", "local", "--data", sample_data, "--categories", "textile"),
        *("--shots", "1", "--seeds", "0", "--steps", "4", "--trials", "1"),
        *("--storage", tmp_path),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    prompt_set, _ = Registry(mlflow_server).load("textile")
    assert prompt_set.settings == FitSettings(steps=4)
    assert prompt_set.provenance.shots == 1
    assert prompt_set.threshold.source == "calibration images"


def test_missing_data_is_named_with_the_advice(mlflow_server: str, tmp_path: Path) -> None:
    done = run_search(
        *("--ray-address", "local", "--data", tmp_path / "nowhere"),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in done.stderr
    assert "absolute path" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_ray_it_says_how_to_start_one(sample_data: Path, mlflow_server: str) -> None:
    done = run_search("--data", sample_data, MLFLOW_TRACKING_URI=mlflow_server)
    assert done.returncode == 1
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ray_that_is_away_is_named(sample_data: Path, mlflow_server: str) -> None:
    (port,) = free_ports(1)
    done = run_search(
        *("--ray-address", f"127.0.0.1:{port}", "--data", sample_data),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 1
    assert f"cannot connect to Ray at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--data"),
        (("--data", ".", "--trials", "0"), "trials"),
        (("--data", ".", "--seeds", "0,x"), "list of numbers"),
        (("--data", ".", "--seeds", "1,1"), "differ"),
        (("--data", ".", "--steps", "3"), "steps"),
    ],
)
def test_wrong_usage_is_explained(arguments: tuple[str, ...], complaint: str) -> None:
    done = run_search(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_space_holds_valid_settings_and_the_defaults() -> None:
    space = search_space()
    assert set(space) == set(SEARCHED)
    drawn = [{name: space[name].sample() for name in SEARCHED} for _ in range(50)]
    for settings in drawn:
        FitSettings.parse(settings)
    assert {settings["context_length"] for settings in drawn} <= set(range(2, 17))
    assert all(0.003 <= settings["learning_rate"] <= 0.3 for settings in drawn)
    assert FitSettings.parse(starting_point()) == FitSettings()


TRIAL = TrialRecord(
    number=0,
    settings=starting_point(),
    steps=(25, 50, 75, 100),
    held_out=(0.6, 0.7, 0.8, 0.8),
    held_out_sd=(0.1, 0.1, 0.1, 0.1),
    families={},
    error=None,
)


def trial(number: int, **changes: Any) -> TrialRecord:
    return replace(TRIAL, number=number, **changes)


def test_winner_has_the_best_last_value() -> None:
    better = trial(1, held_out=(0.5, 0.5, 0.5, 0.81))
    assert choose_winner([TRIAL, better]) is better


def test_winner_of_equals_has_the_least_spread() -> None:
    steadier = trial(1, held_out_sd=(0.2, 0.2, 0.2, 0.05))
    assert choose_winner([TRIAL, steadier]) is steadier


def test_a_stopped_trial_does_not_win_by_an_early_value() -> None:
    stopped = trial(1, steps=(25,), held_out=(0.99,), held_out_sd=(0.0,))
    assert choose_winner([stopped, TRIAL]) is TRIAL


def test_an_undefined_value_does_not_win() -> None:
    undefined = trial(1, held_out=(0.9, 0.9, 0.9, math.nan))
    assert choose_winner([undefined, TRIAL]) is TRIAL


def test_where_every_trial_failed_the_first_error_is_raised() -> None:
    failed = trial(0, steps=(), held_out=(), held_out_sd=(), error=DataError("a broken picture"))
    with pytest.raises(DataError, match="a broken picture"):
        choose_winner([failed, replace(failed, number=1)])
