"""Fleets and batches on several nodes, one of which is lost while images are inspected."""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import command_environment, free_ports
from serving.bulk.results import Output
from tests.nodes import Nodes, three_nodes
from tests.servers import BUCKET, moto, upload
from tests.serving.fleets import Deployed, Load

_IMAGES = 60


@dataclass(frozen=True)
class _Stack:
    """What a fleet's commands need."""

    environment: Mapping[str, str]


def replicas_by_node(nodes: Nodes) -> dict[str, int]:
    """Node -> how many replicas of the pool run there."""
    url = f"http://{nodes.cluster.webui_url}/api/serve/applications/"
    details: dict[str, Any] = httpx.get(url, trust_env=False, timeout=60).json()
    found: dict[str, int] = {}
    for replica in details["applications"]["pool-washer"]["deployments"]["Pool"]["replicas"]:
        if replica["state"] == "RUNNING":
            found[replica["node_id"]] = found.get(replica["node_id"], 0) + 1
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_are_spread_and_the_loss_of_a_node_costs_no_image(
    prompt_set: PromptSet, category: Category, mlflow_server: str, tmp_path: Path
) -> None:
    picture = category.good[0].read_bytes()
    slow = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # where many tests run at once
    with three_nodes(tmp_path, environment=slow, head_cpus=0, dashboard=True) as nodes:
        fleet = Deployed(
            stack=_Stack({"RAY_ADDRESS": nodes.address, "MLFLOW_TRACKING_URI": mlflow_server}),  # type: ignore[arg-type]
            port=free_ports(1)[0],
            folder=tmp_path,
        )
        fleet.register(prompt_set, "washer")
        done = fleet.deploy(
            {
                "categories": {"washer": {}},
                # However slow this machine is, none is refused.
                "http": {"timeout_s": 100},
                "defaults": {
                    "num_cpus": 0.25,
                    "max_wait_s": 100,
                    "autoscaling": {"min_replicas": 2, "max_replicas": 2},
                },
            }
        )
        assert done.returncode == 0, done.stderr
        placed = replicas_by_node(nodes)
        assert placed == dict.fromkeys(nodes.workers, 1)
        with Load(fleet.url, ("washer",), picture, per_second=1, retry_after_s=2) as load:
            load.wait_for("washer", 1)
            lost = next(iter(placed))
            nodes.lose(lost)
            deadline = time.monotonic() + 300
            while sum((placed := replicas_by_node(nodes)).values()) < 2 or lost in placed:
                assert time.monotonic() < deadline, placed
                time.sleep(0.5)
            load.wait_for("washer", 1)
        # Who asks once more gets an answer.
        assert load.failed(attempts=2) == []
        assert fleet.get("/v1/washer")["version"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_on_nodes_that_share_only_s3_goes_on_when_one_is_lost(
    prompt_set: PromptSet, category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_set.save(tmp_path / "set.safetensors")
    with moto(tmp_path) as bucket, three_nodes(tmp_path, environment=bucket, head_cpus=0) as nodes:
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        for number in range(_IMAGES):
            upload(bucket, f"line/{number:03}.png", category.good[0].read_bytes())
        output = Output.at(f"s3://{BUCKET}/out")
        batch = subprocess.Popen(
            [
                *(sys.executable, "-m", "serving.batch", "--ray-address", nodes.address),
                *("--input", f"s3://{BUCKET}/line", "--output", f"s3://{BUCKET}/out"),
                *("--prompt-set", str(tmp_path / "set.safetensors"), "--block-images", "2"),
            ],
            env=command_environment() | bucket,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while len(output.finished()[0]) < 6:
                assert batch.poll() is None, batch.communicate()[0]
                time.sleep(0.5)
            # What counts the attempts is asked for every block, wherever it runs.
            nodes.lose(nodes.worker_of("Attempts") or next(iter(nodes.workers)))
            said, _ = batch.communicate()
        finally:
            batch.kill()
            batch.wait()
        assert batch.returncode == 0, said
        keys, tallies = output.finished()
    assert len(keys) == sum(tally.images for tally in tallies.values()) == _IMAGES
