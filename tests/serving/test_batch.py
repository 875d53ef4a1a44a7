"""serving.batch: batches as a person runs them, on a real Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import command_environment
from apt_ray.features.protocol import Backbone
from apt_ray.files import location, put
from apt_ray.images import read_image
from serving.batch import main
from serving.bulk.inputs import Input, find_inputs, to_table
from serving.bulk.pipeline import Asked, Resources, cut, inspect_all
from serving.bulk.results import Output
from serving.bulk.stages import TO_DO, Attempts, Batch, Decoder, Model, Verdicts, Writer
from serving.bulk.versions import Version, versions_of
from tests import servers
from tests.processes import processes_below
from tests.registry.fake import FakeRegistry
from tests.serving.bulk.test_inputs import write_archive

ROOT = Path(__file__).resolve().parents[2]
SMALL = Resources(
    actors=1,
    threads=1,
    gpus=0,
    decoders=2,
    writers=1,
    batch_size=4,
    block_images=4,
    runtime="auto",
)


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(output / "inspections").to_pylist()
    assert len({(r["category"], r["path"], r["member"]) for r in rows}) == len(rows), "twice"
    return sorted(rows, key=lambda row: (row["path"], row["member"] or ""))


def summary_of(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def wait_until(is_so: Callable[[], object], *, timeout_s: float = 300) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def images(category: Category, tmp_path: Path) -> Path:
    """A folder of five images, one of them damaged, and an archive of two more."""
    folder = tmp_path / "images"
    (folder / "defects").mkdir(parents=True)
    shutil.copy(category.good[0], folder / "good.png")
    defects = [each.path for each in category.test if each.is_anomalous][:3]
    for number, path in enumerate(defects):
        shutil.copy(str(path), folder / "defects" / f"{number}.png")
    (folder / "damaged.png").write_bytes((folder / "good.png").read_bytes()[:500])
    packed = {f"{number}.png": path.read_bytes() for number, path in enumerate(defects[:2])}
    write_archive(folder / "part.tar", packed)
    return folder


@pytest.fixture
def stored(prompt_set: PromptSet, tmp_path: Path) -> Path:
    """The file of the prompt set."""
    prompt_set.save(tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


def two(prompt_set: PromptSet) -> dict[str, Version]:
    """Two categories in a registry."""
    registry = FakeRegistry()
    for name in ("bottle", "cable"):
        registry.register(prompt_set.with_category(name), pictures={}, trials=[])
    return versions_of(["bottle", "cable"], registry=registry)


def batch_of(
    inputs: list[Input], versions: dict[str, Version], output: Path, attempts: type[Attempts]
) -> Batch:
    """What the stages of a batch know."""
    return Batch(
        inputs=ray.put(to_table(inputs)),
        verdicts={name: Verdicts.of(version) for name, version in versions.items()},
        output=Output.at(str(output)),
        overlays="none",
        attempts=ray.remote(num_cpus=0)(attempts).remote(),
    )


def test_a_batch_says_what_the_detector_says_and_goes_on(
    images: Path,
    stored: Path,
    tmp_path: Path,
    backbone: Backbone,
    prompt_set: PromptSet,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    command = ["--input", str(images), "--output", str(output), "--prompt-set", str(stored)]
    command += ["--overlays", "rejects", "--block-images", "3", "--actors", "1"]
    assert main([*command, "--cpus-per-actor", "1", "--limit", "6"]) == 1
    rows = rows_of(output)
    assert len(rows) == 6
    detector = Detector(backbone, prompt_set)
    for row in rows:
        place = images / "defects" / row["member"] if row["member"] else Path(row["path"])
        if place.name == "damaged.png":
            assert "damaged.png is damaged" in row["error"]
            assert row["anomaly_score"] is row["is_anomalous"] is row["regions"] is None
            continue
        image = read_image(place)
        (expected,) = detector.inspect([image])
        assert row["anomaly_score"] == pytest.approx(expected.anomaly_score, abs=1e-5)
        assert row["is_anomalous"] == expected.is_anomalous
        assert len(row["regions"]) == len(expected.regions)
        assert (row["width"], row["height"], row["version"]) == (*image.size, None)
        assert (row["overlay"] is not None) == expected.is_anomalous
        if row["overlay"]:
            assert read_image(row["overlay"]).size == image.size
    assert any(row["overlay"] for row in rows)

    # The seventh image, and the damaged one, which is whole by now; nothing else again.
    shutil.copy(images / "good.png", images / "damaged.png")
    files = {path: path.stat().st_mtime_ns for path in (output / "inspections").iterdir()}
    whole = [path for path in files if "damaged" not in str(pq.read_table(path)["path"])]
    assert main([*command, "--retry-errors"]) == 0
    assert len(rows_of(output)) == 7
    assert summary_of(output)["run"]["images"] == 2
    assert all(path.stat().st_mtime_ns == files[path] for path in whole)

    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "7 images, 7 of them finished before" in said
    assert summary_of(output)["run"] is None
    (category,) = summary_of(output)["categories"].values()
    assert (category["images"], category["unreadable"], sum(category["scores"])) == (7, 0, 7)


def test_categories_by_a_column_in_one_run(
    images: Path, tmp_path: Path, prompt_set: PromptSet, ray_local: None
) -> None:
    paths = [images / "defects" / f"{number}.png" for number in range(3)]
    columns = {"path": [str(path) for path in paths], "category": ["bottle", "cable", "bottle"]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    inputs = find_inputs([str(tmp_path / "list.parquet")], category_column="category")
    lines: list[str] = []
    run = inspect_all(
        inputs, two(prompt_set), Output.at(str(tmp_path / "out")), SMALL, say=lines.append
    )
    rows = rows_of(tmp_path / "out")
    assert [(row["category"], row["version"]) for row in rows] == [
        ("bottle", 1),
        ("cable", 1),
        ("bottle", 1),
    ]
    assert len(list((tmp_path / "out" / "inspections").iterdir())) == 1  # one backbone
    assert run.tallies["bottle"].images == 2
    assert run.slowest in run.busy
    assert "3 of 3 images (100%)" in lines[-1]


def test_what_kills_its_process_again_and_again_is_given_up(
    images: Path, tmp_path: Path, prompt_set: PromptSet, ray_local: None
) -> None:
    """Each beginning counts, whether it ended or not; here the processes live on."""
    versions = two(prompt_set)
    inputs = find_inputs([str(images)], category="bottle")
    batch = batch_of(inputs, versions, tmp_path / "out", Attempts)
    ((start, stop, size),) = cut(inputs, versions, 10)
    block = pa.table([[start], [stop], [size]], schema=TO_DO)
    for _ in range(4):
        assert not Decoder(batch)(block)["given_up"][0].as_py()
    decoded = Decoder(batch)(block)
    assert decoded["given_up"][0].as_py()
    model = Model(
        batch=batch,
        versions=ray.put(versions),
        batch_size=4,
        threads=1,
        device="cpu",
        runtime="torch",
    )
    done = Writer(batch)(model(decoded))
    assert done["given_up"][0].as_py()
    assert not (tmp_path / "out").exists()


def test_blocks_of_what_is_left_are_those_of_before(prompt_set: PromptSet) -> None:
    versions = two(prompt_set)
    inputs = find_inputs([str(ROOT / "docs")], category="bottle")[:10]
    assert [block[:2] for block in cut(inputs, versions, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert [block[:2] for block in cut(inputs[4:], versions, 4)] == [(0, 4), (4, 6)]


def test_what_cannot_be_done_is_said_before_anything_is(
    images: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    rest = ["--prompt-set", str(stored)]
    place, output = ["--input", str(images)], ["--output", str(tmp_path / "out")]
    wrong = {
        "a file is where a folder should be": [*place, "--output", str(tmp_path / "file"), *rest],
        "would lie in ": [*place, "--output", str(images / "out"), *rest],
        "there is no ": ["--input", str(tmp_path / "absent"), *output, *rest],
        "cannot read ": [*place, *output, "--prompt-set", str(tmp_path / "absent")],
        "--version y: no image is of this category": [
            *place,
            *output,
            "--category",
            "x",
            "--version",
            "y=3",
        ],
        "MLFLOW_TRACKING_URI": [*place, *output, "--category", "x"],
    }
    for message, command in wrong.items():
        assert main(command) == 1, message
        assert message in capsys.readouterr().err
    for command in (place, [*place, *output], [*place, *output, *rest, "--alias", "champion"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
    capsys.readouterr()
    assert main([*place, *output, *rest, "--dry-run"]) == 0
    assert "7 images would be inspected" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_actor_that_fits_nowhere_is_refused(ray_local: None) -> None:
    from apt_ray.errors import SettingsError

    assert Asked(actors=2, threads=1, gpus=0).of_cluster().writers >= 1
    with pytest.raises(SettingsError, match="no node of the cluster has 2 CPUs and 1 GPUs free"):
        Asked(gpus=1).of_cluster()


@pytest.fixture
def many(category: Category, tmp_path: Path) -> Path:
    """Sixty images."""
    folder = tmp_path / "many"
    folder.mkdir()
    data = read_image(category.good[0]).resize((64, 64))
    for number in range(60):
        data.save(folder / f"{number:03}.png")
    return folder


class Patient(Attempts):
    """Lets a stage begin with a block for ever."""

    def is_last(self, stage: str, start: int) -> bool:
        return False


def test_a_stage_keeps_nothing_of_the_blocks_that_it_gave_on(
    many: Path, tmp_path: Path, prompt_set: PromptSet, ray_local: None
) -> None:
    versions = two(prompt_set)
    inputs = find_inputs([str(many)], category="bottle")
    batch = batch_of(inputs, versions, tmp_path / "out", Patient)
    ((start, stop, size),) = cut(inputs, versions, 100)
    block = pa.table([[start], [stop], [size]], schema=TO_DO)
    decoder = Decoder(batch)
    held = []
    for _ in range(16):
        decoded = decoder(block)
        del decoded
        held.append(psutil.Process().memory_info().rss)
    # The first calls fill the allocator's arenas, one for each thread.
    assert held[-1] - held[7] < 4 * len(inputs) * size**2 * 3  # eight blocks would be twice that


@pytest.mark.slow
def test_a_killed_actor_costs_only_its_block(
    many: Path, tmp_path: Path, prompt_set: PromptSet, ray_local: None
) -> None:
    output = tmp_path / "out"
    inputs = find_inputs([str(many)], category="bottle")
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(list(output.glob("inspections/*.parquet"))) >= 2)
        for process in processes_below(os.getpid(), "MapWorker(MapBatches(Model))"):
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    run = inspect_all(inputs, two(prompt_set), Output.at(str(output)), SMALL, say=lambda _: None)
    killer.join()
    assert killed
    assert run.images == len(rows_of(output)) == 60
    assert not run.lost


def launch(
    *arguments: object, ray_address: str = "local", **environment: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "serving.batch", *map(str, arguments), "--ray-address", ray_address],
        cwd=ROOT,
        env=command_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_was(many: Path, stored: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["--input", many, "--output", output, "--prompt-set", stored, "--block-images", 4]
    first = launch(*command)
    wait_until(lambda: len(list(output.glob("inspections/*.parquet"))) >= 2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("inspections/*.parquet")}
    done = len(rows_of(output))
    assert 0 < done < 60
    second = launch(*command)
    said, _ = second.communicate()
    assert second.returncode == 0, said
    assert len(rows_of(output)) == 60
    # What was being written when the first one was killed may have come meanwhile.
    assert summary_of(output)["run"]["images"] <= 60 - done
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as environment:
        url = environment.pop("MLFLOW_S3_ENDPOINT_URL")
        yield environment | {"AWS_ENDPOINT_URL_S3": url}


@pytest.mark.slow
def test_images_and_rows_may_lie_in_s3(
    images: Path,
    stored: Path,
    bucket: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from apt_ray.files import s3_client

    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    s3_client.cache_clear()
    place = location(f"s3://{servers.BUCKET}/line")
    for path in (path for path in images.rglob("*") if path.is_file()):
        put(place / path.relative_to(images).as_posix(), path.read_bytes())
    output = f"s3://{servers.BUCKET}/out"
    command = ["--input", str(place), "--output", output, "--prompt-set", stored]
    first = launch(*command, "--overlays", "all", **bucket)
    said, _ = first.communicate()
    assert first.returncode == 1, said
    keys, tallies = Output.at(output).finished()
    assert len(keys) == 7
    (tally,) = tallies.values()
    assert tally.unreadable == 1
    drawn = list((location(output) / "overlays").iterdir())
    assert len(list(drawn[0].iterdir())) == 6
    assert main([*map(str, command)]) == 1  # nothing is left to do
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", os.devnull)
    s3_client.cache_clear()
    assert main([*map(str, command)]) == 1
    s3_client.cache_clear()
