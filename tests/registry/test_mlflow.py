"""MLflow as the registry: what its server shows and holds, and how it is reached."""

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from apt_ray.detection.calibration import calibrate
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import free_ports
from apt_ray.errors import PromptSetError, RegistryError
from apt_ray.registry import Registry, open_registry, promote, prune
from apt_ray.registry.mlflow.names import MARK
from tests.registry.registering import make_prompt_set

TRIALS: list[Mapping[str, object]] = [
    {"trial": 0, "noise_strength": 0.3, "validation": 0.9, "status": "finished"},
    {"trial": 1, "noise_strength": 0.6, "validation": None, "status": "failed"},
]
PICTURE = Image.new("RGB", (24, 16), (200, 30, 30))


@pytest.fixture
def registry(mlflow_server: str) -> Registry:
    return open_registry(mlflow_server)


def register(registry: Registry, category: str, *, seed: int = 0) -> int:
    registered = registry.register(
        make_prompt_set(category, seed=seed),
        pictures={"support_images": PICTURE},
        trials=TRIALS,
        tags={"ray.job_id": "01000000"},
    )
    return registered.version


def test_a_version_has_its_page_in_mlflow(registry: Registry) -> None:
    version = register(registry, "paged")
    assert registry.page("paged", version) == "#/models/apt-paged/versions/1"


def test_champions_leave_out_categories_without_one(registry: Registry, mlflow_server: str) -> None:
    register(registry, "demoted")
    MlflowClient(mlflow_server).delete_registered_model_alias("apt-demoted", "champion")
    assert "demoted" not in registry.champions()
    register(registry, "demoted")
    assert registry.champions()["demoted"] == 2


def test_version_carries_its_provenance(registry: Registry, mlflow_server: str) -> None:
    register(registry, "provenance")
    version = registry.resolve("provenance")
    assert version.tags["fingerprint"] == "f1" * 32
    assert version.tags["support_hash"] == "ab" * 32
    assert version.tags["certified_rate"] == "0.25"
    assert version.tags["ray.job_id"] == "01000000"
    assert version.tags["library.numpy"] == np.__version__

    client = MlflowClient(mlflow_server)
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {
        "validation": 0.9125,
        "validation_sd": 0.0312,
        "validation.scratch": 0.87,
        "threshold": 0.3,
        "calibration_images": 3,
    }
    assert run.data.params["context_length"] == "8"
    assert run.data.params["backbone.name"] == "builtin"
    files = {file.path for file in client.list_artifacts(version.run_id, "version")}
    assert files == {
        f"version/{name}"
        for name in (
            "MLmodel",
            "pictures",
            "prompt_set.safetensors",
            "python_env.yaml",
            "requirements.txt",
            "trials.csv",
        )
    }
    table = client.download_artifacts(version.run_id, "version/trials.csv")
    assert Path(table).read_text().splitlines() == [
        "trial,noise_strength,validation,status",
        "0,0.3,0.9,finished",
        "1,0.6,,failed",
    ]


def test_page_shows_figures_and_pictures(registry: Registry, mlflow_server: str) -> None:
    register(registry, "page")
    page = MlflowClient(mlflow_server).get_model_version("apt-page", "1").description
    headline = page.splitlines()[0]
    assert "validation 0.9125 ± 0.0312" in headline
    assert "threshold 0.3000 (at most 0.25 of good parts rejected)" in headline
    link = page.rpartition("![support_images](")[2].rstrip(")")
    with urlopen(f"{mlflow_server}/{link}") as answer:
        assert Image.open(io.BytesIO(answer.read())).size == PICTURE.size


def test_uncertified_threshold_says_so(registry: Registry, mlflow_server: str) -> None:
    sure = make_prompt_set("unsure")
    unsure = PromptSet(
        provenance=sure.provenance.model_copy(update={"threshold": calibrate([0.1, 0.2], 0.05)}),
        text_features=sure.text_features,
        contexts=sure.contexts,
        meta_features=sure.meta_features,
        memory=sure.memory,
    )
    registered = registry.register(unsure, pictures={}, trials=[])
    assert registered.tags["certified_rate"] == "uncertified"
    page = MlflowClient(mlflow_server).get_model_version("apt-unsure", "1").description
    assert "uncertified" in page.splitlines()[0]


def test_damaged_artifact(registry: Registry, mlflow_server: str, tmp_path: Path) -> None:
    register(registry, "damaged")
    path = tmp_path / "prompt_set.safetensors"
    path.write_bytes(b"no prompt set")
    run_id = registry.resolve("damaged").run_id
    MlflowClient(mlflow_server).log_artifact(run_id, str(path), "version")
    with pytest.raises(PromptSetError, match="version 1 of damaged"):
        registry.load("damaged")


def test_version_without_a_prompt_set(registry: Registry, mlflow_server: str) -> None:
    register(registry, "emptied")
    client = MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("emptied")).info.run_id
    client.create_model_version(
        "apt-emptied", source=f"runs:/{run_id}/model", run_id=run_id, tags={MARK: "version"}
    )
    with pytest.raises(RegistryError, match="version 2 of emptied holds no prompt set"):
        registry.load("emptied", "2")


def put_by_others(client: MlflowClient, model: str) -> str:
    """A version without the mark, by another team's hand; its number."""
    experiment = client.get_experiment_by_name("somebody else's")
    experiment_id = experiment.experiment_id if experiment else None
    run = client.create_run(experiment_id or client.create_experiment("somebody else's"))
    source = f"runs:/{run.info.run_id}/model"
    number: str = client.create_model_version(model, source, run_id=run.info.run_id).version
    return number


def test_a_model_of_others_is_left_alone_whatever_its_name(
    registry: Registry, mlflow_server: str
) -> None:
    client = MlflowClient(mlflow_server)
    client.create_registered_model("apt-portfolio", tags={"team": "finance"})
    for _ in range(3):
        put_by_others(client, "apt-portfolio")
    client.set_registered_model_alias("apt-portfolio", "champion", "3")
    assert "portfolio" not in registry.aliases()
    assert registry.versions("portfolio") == []
    assert not [one for one in prune(registry, keep=1, days=0) if one.category == "portfolio"]
    asks: list[Callable[[], object]] = [
        lambda: registry.resolve("portfolio"),
        lambda: registry.load("portfolio", "2"),
        lambda: registry.history("portfolio"),
        lambda: registry.delete("portfolio", 1),
        lambda: prune(registry, ["portfolio"], keep=1, days=0),
        lambda: promote(registry, "portfolio", "1", force="mine"),
        lambda: register(registry, "portfolio"),
    ]
    for ask in asks:
        with pytest.raises(RegistryError, match=r"apt-ray \(it lacks the tag `apt-ray`\)"):
            ask()
    model = client.get_registered_model("apt-portfolio")
    assert (model.tags, model.aliases) == ({"team": "finance"}, {"champion": "3"})
    assert len(client.search_model_versions("name = 'apt-portfolio'")) == 3
    # Its owner may hand it over.
    client.set_registered_model_tag("apt-portfolio", MARK, "category")
    register(registry, "portfolio")
    assert registry.versions("portfolio") == [4]


def test_a_version_of_others_among_ones_own_is_passed_over(
    registry: Registry, mlflow_server: str
) -> None:
    client = MlflowClient(mlflow_server)
    for seed in range(3):
        register(registry, "visited", seed=seed)
    number = put_by_others(client, "apt-visited")
    assert number == "4"
    assert registry.versions("visited") == [3, 2, 1]
    assert [one.version for one in prune(registry, ["visited"], keep=1, days=0, dry_run=False)] == [
        2
    ]
    register(registry, "visited", seed=3)
    assert registry.aliases()["visited"] == {"champion": 1, "candidate": 5}
    put_by_others(client, "apt-visited")
    assert registry.resolve("visited", "candidate").version == 5
    client.set_registered_model_alias("apt-visited", "champion", "4")
    with pytest.raises(RegistryError, match=r"version 4 of .* was not registered by apt-ray"):
        registry.load("visited")
    assert len(client.search_model_versions("name = 'apt-visited'")) == 5


def test_what_was_registered_before_there_was_a_mark_is_known_by_its_other_tags(
    registry: Registry, mlflow_server: str
) -> None:
    client = MlflowClient(mlflow_server)
    for name in ("served", "waiting"):
        for seed in (0, 1):
            registry.register(
                make_prompt_set(name, seed=seed), pictures={}, trials=[], promote=name == "served"
            )
            client.delete_model_version_tag(f"apt-{name}", str(seed + 1), MARK)
        client.delete_registered_model_tag(f"apt-{name}", MARK)
        assert registry.versions(name) == [2, 1]
        assert name in registry.aliases()
    put_by_others(client, "apt-served")
    assert registry.aliases()["served"] == {"champion": 1, "candidate": 2}
    assert registry.history("served").champion == 1
    registry.load("waiting", "1")
    register(registry, "waiting", seed=2)
    assert MARK in client.get_registered_model("apt-waiting").tags
    registry.delete("waiting", 1)
    assert registry.versions("waiting") == [3, 2]


def test_deleting_a_copy_leaves_the_run_of_the_original(
    registry: Registry, mlflow_server: str
) -> None:
    client = MlflowClient(mlflow_server)
    register(registry, "original")
    for _ in range(2):
        client.copy_model_version("models:/apt-original/1", "apt-copy")
    assert registry.versions("copy") == [2, 1]
    assert "copy" in registry.aliases()
    registry.delete("copy", 1)
    run_id = registry.resolve("original").run_id
    assert client.get_run(run_id).info.lifecycle_stage == "active"
    registry.load("original")
    client.delete_model_version("apt-copy", "2")
    registry.delete("original", 1)
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_address_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI"):
        open_registry()


def test_address_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, mlflow_server: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    assert open_registry().address == mlflow_server


def test_absent_server_is_reported_soon_and_without_its_password() -> None:
    (port,) = free_ports(1)
    registry = open_registry(f"http://inspector:sesame@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(
        RegistryError, match=rf"http://127\.0\.0\.1:{port}.*mlflow server"
    ) as caught:
        registry.champions()
    assert time.monotonic() - started < 30  # MLflow's own retries take minutes
    assert "sesame" not in str(caught.value)


def test_refusal_hides_the_password(mlflow_server: str) -> None:
    parts = urlsplit(mlflow_server)
    registry = open_registry(f"http://inspector:sesame@{parts.netloc}/elsewhere")
    with pytest.raises(RegistryError) as caught:
        registry.check()
    assert "sesame" not in str(caught.value)
