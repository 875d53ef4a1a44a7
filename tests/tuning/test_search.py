"""tuning: the search as a person runs it, in processes of its own on a real Ray."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mlflow import MlflowClient

from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import (
    HOST,
    LocalStack,
    command_environment,
    free_ports,
    launch_mlflow,
)
from apt_ray.registry import CANDIDATE, CHAMPION, open_registry
from tests.nodes import three_nodes
from tests.registry.registering import logged_trials, register, spoilt
from tests.servers import BUCKET, moto, upload
from tests.serving.fleets import ray_workers
from tuning.records import SearchStore, TrialRecord
from tuning.search import main
from tuning.space import read_space

ROOT = Path(__file__).resolve().parents[2]
# The trunk would take most of the time of these searches, and nothing here depends on it.
TOWERS_ALONE = ("--reference-encoder", "backbone")
QUICK = (*TOWERS_ALONE, "--shots", "2", "--seeds", "0", "--max-steps", "8")
KILLABLE = (
    *(*TOWERS_ALONE, "--shots", "2", "--seeds", "0"),
    *("--max-steps", "160", "--scheduler", "none"),
)
SHARED = ("--engine", "shared")
STEPS = (40, 80, 120, 160)

pytestmark = pytest.mark.timeout(600)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tuning.search", *map(str, arguments)]


def run_search(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
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


@dataclass
class RunningSearch:
    """A search as a driver process on the stack's Ray, in a storage of its own."""

    environment: Mapping[str, str]
    folder: Path
    storage: str = ""
    banks: str = ""
    process: "subprocess.Popen[str]" = field(init=False)

    @property
    def name(self) -> str:
        (name,) = set(re.findall(r"--resume (\S+)", self.log()))
        return str(name)

    @property
    def store(self) -> SearchStore:
        return SearchStore(self.storage, self.name)

    def start(self, *arguments: object, mlflow: str | None = None) -> None:
        log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(
            command("--storage", self.storage, "--bank-cache", self.banks, *arguments),
            cwd=ROOT,
            env=os.environ
            | dict(self.environment)
            | ({"MLFLOW_TRACKING_URI": mlflow} if mlflow else {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log.close()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 500
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05 if self.storage.startswith("/") else 1)

    def reports(self, category: str) -> int:
        if "--resume" not in self.log():
            return 0
        return sum(len(trial.steps) for trial in self.store.trials(category))

    def ended(self, category: str) -> list[TrialRecord]:
        return [trial for trial in self.store.trials(category) if trial.has_ended]

    def wait(self) -> None:
        assert self.process.wait(500) == 0, self.log()


@pytest.fixture
def running(stack: LocalStack, tmp_path: Path) -> Iterator[RunningSearch]:
    search = RunningSearch(
        stack.environment,
        tmp_path,
        storage=str(tmp_path / "storage"),
        banks=str(tmp_path / "banks"),
    )
    yield search
    if search.process.poll() is None:
        search.process.kill()
        search.process.wait()


def assert_every_trial_once(search: RunningSearch, uri: str, category: str, trials: int) -> None:
    records = search.store.trials(category)
    assert [record.number for record in records] == list(range(trials))
    assert {(record.status, record.steps) for record in records} == {("finished", STEPS)}
    assert logged_trials(uri, search.name) == [f"{category}/{n}" for n in range(trials)]
    _, version = open_registry(uri).load(category, CANDIDATE)
    assert version.tags["search"] == search.name


def test_job_keeps_what_succeeded_beside_a_broken_category(
    stack: LocalStack, sample_data: Path, prompt_set: PromptSet, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_data / "blister", data / "blister")
    shutil.copytree(sample_data / "washer", data / "washer")
    for picture in (data / "blister" / "train" / "good").iterdir():
        picture.write_bytes(picture.read_bytes()[:200])
    tracking_uri = stack.environment["MLFLOW_TRACKING_URI"]
    summary_file = tmp_path / "summary.json"
    pictures = sorted((sample_data / "washer" / "train" / "good").iterdir())
    registry = open_registry(tracking_uri)
    before = spoilt(prompt_set.with_category("washer"))
    space = tmp_path / "space.yaml"
    space.write_text(
        "context_length: {low: 2, high: 16}\nnoise_strength: {choices: [0.1, 0.3]}\n"
        "region: {choices: [random, everywhere]}\n"
    )
    register(registry, before, support=tuple(pictures[-2:]))
    submitted = subprocess.run(
        [
            *("ray", "job", "submit", "--working-dir", ".", "--", "python", "tuning/search.py"),
            *QUICK,
            *("--seeds", "0,1", "--trials", "4", "--data", str(data), "--mlflow", tracking_uri),
            *("--storage", str(tmp_path / "ray"), "--summary", str(summary_file)),
            *("--bank-cache", str(tmp_path / "banks"), "--space", str(space)),
        ],
        cwd=ROOT,
        env=command_environment() | stack.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = submitted.stdout

    assert "failed with exit code 1" in log, log
    assert "Traceback" not in log
    assert log.count("blister failed: ") == 1
    assert re.search(r"washer +4/4 +0 +\d\.\d+ ± \d\.\d+", log)
    assert re.search(r"not registered: blister: .*blister/train/good/\S+ is damaged", log)
    assert re.search(r"^category +context_length .*\nwasher .* 2 *$", log, re.MULTILINE)
    assert re.search(r"^washer: (the search found nothing|the winner is) better", log, re.MULTILINE)

    assert registry.champions() == {"washer": 2}
    assert "version 2 was promoted: validation value +" in log
    found, version = registry.load("washer")
    assert version.tags["ray.submission_id"] in log
    assert version.tags["verdict"] == "promoted"

    shown = MlflowClient(tracking_uri).list_artifacts(version.run_id, "version/pictures")
    assert {Path(picture.path).stem for picture in shown} >= {
        "perturbations",
        "parallel_coordinates",
        "slices",
        "support_images",
        "trials",
        "value_over_time",
    }
    washer, blister = json.loads(summary_file.read_text())["categories"]
    assert (blister["category"], blister["status"]) == ("blister", "failed")
    assert "is damaged" in blister["reason"]
    assert (washer["status"], washer["version"]) == ("registered", 2)
    assert FitSettings(**washer["settings"]) == found.settings
    assert washer["metrics"] == found.metrics
    assert 0 <= washer["metrics"]["validation"] <= 1
    assert len(washer["trials"]) == 4
    winner = next(
        trial
        for trial in washer["trials"]
        if trial["validation"] == washer["metrics"]["validation"]
    )
    assert winner["steps"] == found.settings.steps == 8
    assert all(winner[name] == washer["settings"][name] for name in read_space(space))
    assert {trial["region"] for trial in washer["trials"]} == {"random", "everywhere"}
    # A bank for each seed and region, and a judge for each seed.
    assert len(list((tmp_path / "banks").glob("*.safetensors"))) == 6


def test_nothing_is_lost_when_engine_trial_and_mlflow_are_killed(
    running: RunningSearch, sample_data: Path, tmp_path: Path, stack: LocalStack
) -> None:
    (port,) = free_ports(1)
    mlflow = launch_mlflow(tmp_path / "mlflow", port=port)
    mlflow.wait_until_ready("/health")
    running.start(
        *(*KILLABLE, *SHARED, "--data", sample_data, "--categories", "washer"),
        *("--trials", "4", "--live-trials", "2"),
        mlflow=mlflow.url,
    )
    running.wait_for(lambda: running.reports("washer") >= 1)
    ray_workers(stack, "ray::EngineActor")[0].kill()
    running.wait_for(lambda: running.reports("washer") >= 4)
    ray_workers(stack, "ray::ImplicitFunc")[0].kill()
    mlflow.terminate()
    running.wait_for(lambda: "waits for the registry" in running.log())
    mlflow.wait_until_ended()
    with launch_mlflow(tmp_path / "mlflow", port=port):
        running.wait()
        assert_every_trial_once(running, mlflow.url, "washer", 4)


@pytest.mark.slow
def test_a_killed_driver_is_resumed_where_it_was(
    running: RunningSearch, sample_data: Path, stack: LocalStack
) -> None:
    running.start(
        *(*KILLABLE, "--data", sample_data, "--categories", "textile"),
        *("--trials", "5", "--live-trials", "2", "--searcher", "optuna"),
    )
    running.wait_for(lambda: running.reports("textile") >= 9)
    running.process.kill()
    running.process.wait()
    before = {record.number: record for record in running.store.trials("textile")}
    assert 0 < len(running.ended("textile")) < 5

    running.start("--resume", running.name)
    running.wait()
    assert "not run again" in running.log()
    uri = stack.environment["MLFLOW_TRACKING_URI"]
    assert_every_trial_once(running, uri, "textile", 5)
    for record in running.store.trials("textile"):
        if record.number in before:
            known = before[record.number]
            assert record.settings == known.settings
            assert record.validation[: len(known.steps)] == known.validation
    version = open_registry(uri).resolve("textile", CANDIDATE).version

    running.start("--resume", running.name)  # nothing is left to do
    running.wait()
    assert open_registry(uri).resolve("textile", CANDIDATE).version == version


@pytest.mark.slow
def test_a_stopped_search_registers_the_best_so_far_within_ten_seconds(
    running: RunningSearch, sample_data: Path, stack: LocalStack
) -> None:
    running.start(
        *(*TOWERS_ALONE, "--shots", "2", "--seeds", "0", "--max-steps", "400"),
        *("--data", sample_data),
        *(
            "--categories",
            "blister",
            "--trials",
            "3",
            "--live-trials",
            "1",
            "--summary",
            "/dev/full",
        ),
    )
    running.wait_for(lambda: running.reports("blister") >= 1)
    running.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert running.process.wait(60) == 143, running.log()
    assert time.monotonic() - began < 10
    registry = open_registry(stack.environment["MLFLOW_TRACKING_URI"])
    version = registry.resolve("blister", CANDIDATE)
    assert version.tags["search_status"] == "cut off"
    assert CHAMPION not in version.aliases
    assert "--resume" in running.log()
    assert "error: cannot write /dev/full (No space left on device)" in running.log()


@pytest.mark.slow
def test_two_categories_survive_repeated_kills(
    running: RunningSearch, sample_data: Path, stack: LocalStack
) -> None:
    running.start(
        *(*TOWERS_ALONE, "--shots", "3", "--seeds", "0,1", "--max-steps", "40"),
        *("--data", sample_data),
        *("--categories", "washer,textile", "--scheduler", "none", "--trials", "12"),
        *SHARED,
    )
    for reports, title in ((5, "ImplicitFunc"), (15, "EngineActor"), (30, "ImplicitFunc")):
        running.wait_for(lambda least=reports: running.reports("washer") >= least)
        ray_workers(stack, f"ray::{title}")[0].kill()
    running.process.kill()
    running.process.wait()
    running.start("--resume", running.name)
    running.wait_for(lambda: running.reports("textile") >= 40)
    ray_workers(stack, "ray::EngineActor")[0].kill()
    running.wait()
    for category in ("washer", "textile"):
        records = running.store.trials(category)
        assert [record.number for record in records] == list(range(12))
        assert {record.steps for record in records} == {(10, 20, 30, 40)}
    logged = logged_trials(stack.environment["MLFLOW_TRACKING_URI"], running.name)
    assert len(logged) == len(set(logged)) == 24


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nodes_that_share_only_s3_search_together_and_one_may_be_lost(
    category: Category, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto(tmp_path) as bucket, three_nodes(tmp_path, environment=bucket) as nodes:
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        for path in category.good[:4]:
            upload(bucket, f"line/{category.name}/good/{path.name}", path.read_bytes())
        search = RunningSearch(
            {"MLFLOW_TRACKING_URI": mlflow_server}, tmp_path, storage=f"s3://{BUCKET}/searches"
        )
        try:
            search.start(
                *(*KILLABLE, *SHARED, "--data", f"s3://{BUCKET}/line", "--trials", 8),
                *("--live-trials", 4, "--ray-address", nodes.address),
            )
            search.wait_for(lambda: search.reports(category.name) >= 4)
            assert "3 engine(s) ready" in search.log()
            nodes.lose(next(iter(nodes.workers)))
            search.wait()
            assert_every_trial_once(search, mlflow_server, category.name, 8)
        finally:
            search.process.kill()
            search.process.wait()
        # Images, states and winners were on no disk.
        assert not [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".safetensors")]


def test_private_ray_own_engines_a_single_shot_and_never_promoted(
    sample_data: Path, mlflow_server: str, tmp_path: Path
) -> None:
    done = run_search(
        *("--ray-address", "local", "--data", sample_data, "--categories", "textile"),
        *(*TOWERS_ALONE, "--shots", "1", "--seeds", "0", "--steps", "4", "--trials", "1"),
        *("--engine", "own"),
        *("--storage", tmp_path, "--bank-cache", "", "--promote", "never"),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    registry = open_registry(mlflow_server)
    assert "textile" not in registry.champions()
    prompt_set, _ = registry.load("textile", CANDIDATE)
    assert prompt_set.settings == FitSettings(steps=4)
    assert prompt_set.provenance.shots == 1
    assert prompt_set.threshold.source == "calibration images"


def test_missing_data_is_named_with_the_advice(mlflow_server: str, tmp_path: Path) -> None:
    done = run_search(
        *("--ray-address", "local", "--data", tmp_path / "nowhere", "--storage", tmp_path),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in done.stderr
    assert "absolute path" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_ray_it_says_how_to_start_one(
    sample_data: Path, mlflow_server: str, tmp_path: Path
) -> None:
    done = run_search(
        "--data", sample_data, "--storage", tmp_path, MLFLOW_TRACKING_URI=mlflow_server
    )
    assert done.returncode == 1
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ray_that_is_away_is_named(sample_data: Path, mlflow_server: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    done = run_search(
        *("--ray-address", f"{HOST}:{port}", "--data", sample_data, "--storage", tmp_path),
        MLFLOW_TRACKING_URI=mlflow_server,
    )
    assert done.returncode == 1
    assert f"cannot connect to Ray at {HOST}:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--data", "s3://bucket/products"), "cannot read s3://bucket/products"),
        (("--data", ".", "--storage", "/proc/storage"), "cannot write to the storage /proc"),
        (("--resume", "nothing"), "there is no search nothing"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    arguments: tuple[str, ...],
    complaint: str,
    sample_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Nothing listens there: what the machine itself holds of credentials must not matter.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    named = (str(sample_data) if part == "." else part for part in arguments)
    assert main(["--storage", str(tmp_path), *named]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--data"),
        (("--data", ".", "--trials", "0"), "trials"),
        (("--data", ".", "--seeds", "0,x"), "list of numbers"),
        (("--data", ".", "--seeds", "1,1"), "differ"),
        (("--data", ".", "--max-steps", "3"), "steps"),
        (("--data", ".", "--objective", "pareto"), "--searcher optuna"),
        (("--data", ".", "--engine", "own", "--engine-gpus", "0.5"), "--engine-gpus"),
        (("--data", ".", "--space", "/nowhere.yaml"), "cannot read the search space"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert complaint in capsys.readouterr().err
