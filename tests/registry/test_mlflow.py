"""MLflow as the registry: what its server shows and holds, and how it is reached."""

import io
import time
from collections.abc import Mapping
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
from apt_ray.registry import Registry, open_registry
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
    register(registry, "foreign")
    client = MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("somebody else's")).info.run_id
    client.create_model_version("apt-foreign", source=f"runs:/{run_id}/model", run_id=run_id)
    with pytest.raises(RegistryError, match="version 2 of foreign holds no prompt set"):
        registry.load("foreign", "2")


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
