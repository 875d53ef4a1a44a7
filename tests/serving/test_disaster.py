"""The registry's server and store are destroyed and restored: the fleet serves the same versions,
bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import httpx

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import free_ports, launch_mlflow
from apt_ray.registry import Registry, export_registry, import_registry, open_registry
from tests.serving.console.fleets import WholeFleet, served


def answers(registry: Registry, category: Category, folder: Path) -> list[dict[str, Any]]:
    """What a fleet on this registry says of some images, as far as it is no matter of time."""
    told = []
    with (
        served(WholeFleet(registry, folder, images=0, categories=[category.name])) as fleet,
        httpx.Client(base_url=fleet.url, trust_env=False, timeout=60) as client,
    ):
        for image in category.test[:3]:
            answer = client.post(
                f"/v1/{category.name}/inspect?map=png", content=image.path.read_bytes()
            )
            assert answer.status_code == 200, answer.text
            told.append(answer.json())
    for answer in told:
        for changing in ("request_id", "timings_ms", "run_id"):
            answer.pop(changing, None)
    return told


def test_destroyed_and_restored(
    mlflow_server: str, prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    home, backup = tmp_path / "server" / "mlflow", tmp_path / "registry.tar"
    with launch_mlflow(home, port=free_ports(1)[0]) as server:
        server.wait_until_ready("/health")
        lost = open_registry(server.url)
        for shots in (3, 4):
            lost.register(
                prompt_set.with_metrics({"validation": shots / 10}), pictures={}, trials=[]
            )
        lost.move(lost.history(category.name), 2, action="promote", why="better")
        before = answers(lost, category, tmp_path / "before")
        sent = [lost.fetch(lost.resolve(category.name, str(number))) for number in (1, 2)]
        export_registry(lost, backup)
    shutil.rmtree(home.parent)

    restored = open_registry(mlflow_server)
    import_registry(restored, backup)
    # Nothing of it lies in a cache: the folder is another.
    after = answers(restored, category, tmp_path / "after")
    assert [answer["version"] for answer in after] == [2, 2, 2]
    assert after == before
    numbers = ("1", "2")
    assert [restored.fetch(restored.resolve(category.name, one)) for one in numbers] == sent
