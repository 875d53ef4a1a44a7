"""A registered version as an MLflow model, in an environment without Ray."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import HOST, Server, command_environment, fetch, free_ports
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.registry import open_registry
from tests.registry.registering import register

MODEL = "models:/apt-pyfunc@champion"
PREDICT = f"""
import json, sys
import mlflow.pyfunc

model = mlflow.pyfunc.load_model({MODEL!r})
assert model.metadata.signature is not None
rows = model.predict([open(path, "rb").read() for path in sys.argv[1:]])
print(json.dumps(rows))
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
"""


@pytest.fixture(scope="module")
def environment(
    mlflow_server: str, prompt_set: PromptSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Where the registry has the shared prompt set, and `import ray` fails."""
    register(open_registry(mlflow_server), prompt_set.with_category("pyfunc"))
    blocked = tmp_path_factory.mktemp("without_ray")
    (blocked / "ray").mkdir()
    (blocked / "ray" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module 'ray'\")")
    path = os.pathsep.join([str(blocked), str(Path(__file__).resolve().parents[2])])
    return command_environment() | {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": mlflow_server}


@pytest.fixture(scope="module")
def images(category: Category) -> list[Path]:
    return [image.path for image in category.test if image.is_anomalous][:2]


@pytest.fixture(scope="module")
def expected(
    backbone: FrozenCLIP, prompt_set: PromptSet, images: list[Path]
) -> list[dict[str, object]]:
    inspections = Detector(backbone, prompt_set).inspect([read_image(path) for path in images])
    return [
        {
            "anomaly_score": pytest.approx(inspection.anomaly_score, abs=1e-6),
            "threshold": inspection.threshold,
            "is_anomalous": inspection.is_anomalous,
            "p_value": inspection.p_value,
        }
        for inspection in inspections
    ]


def test_predict_gives_the_scores_of_the_detector_without_ray(
    environment: dict[str, str], images: list[Path], expected: list[dict[str, object]]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PREDICT, *map(str, images)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == expected


@pytest.fixture
def model_server(environment: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    command = ["mlflow", "models", "serve", "--model-uri", MODEL, "--env-manager", "local"]
    with Server.launch(
        "model",
        [*command, "--host", HOST, "--port", str(port), "--workers", "1"],
        url=f"http://{HOST}:{port}",
        log=tmp_path / "log",
        env=environment,
    ) as server:
        server.wait_until_ready("/ping")
        yield server


def test_mlflow_models_serve_gives_the_scores_of_the_detector_without_ray(
    model_server: Server, images: list[Path], expected: list[dict[str, object]]
) -> None:
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in images]
    for body in ({"inputs": encoded}, {"dataframe_split": {"data": [[one] for one in encoded]}}):
        request = Request(
            f"{model_server.url}/invocations",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        assert json.loads(fetch(request))["predictions"] == expected
