"""A fleet on a real cluster, used through the commands and HTTP alone."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.request import Request

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import LocalStack, fetch, free_ports
from apt_ray.errors import AptError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from tests.registry.registering import make_prompt_set
from tests.serving.fleets import Deployed, Load, ray_workers

# A job that is submitted answers once its process has begun, and other tests run meanwhile.
_ASKING: dict[str, Any] = {"trust_env": False, "timeout": 60}

TAIL = {
    "pools": {"tail": {}},
    "defaults": {"max_wait_s": 20, "autoscaling": {"max_replicas": 1}},
}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, prompt_set: PromptSet) -> Iterator[Deployed]:
    """A category of its own that calls everything a defect, and one in a shared pool."""
    folder = tmp_path_factory.mktemp("fleet")
    stack = LocalStack(folder / "stack")
    stack.start()
    try:
        settings = {
            "history": {"images": 5, "folder": str(folder / "history")},
            "feedback": {"folder": str(folder / "feedback")},
            "shadow": {"share": 1},
        }
        fleet = Deployed(stack=stack, port=free_ports(1)[0], folder=folder, settings=settings)
        fleet.register(prompt_set, "blister", "washer")
        done = fleet.deploy(
            TAIL | {"categories": {"blister": {"threshold": 0}, "washer": {"pool": "tail"}}}
        )
        assert done.returncode == 0, done.stderr
        assert f"{fleet.url}/v1/washer/inspect" in done.stdout
        yield fleet
    finally:
        stack.stop()


@pytest.mark.timeout(600)
def test_a_fleet_on_a_real_cluster(
    deployed: Deployed, backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    path = next(image.path for image in category.test if image.is_anomalous)
    picture = path.read_bytes()
    (expected,) = Detector(backbone, prompt_set).inspect([read_image(path)])

    # Each category answers as the detector does, by its own decision, wherever its pool is.
    for name, threshold in (("blister", 0.0), ("washer", prompt_set.threshold.value)):
        answer = deployed.inspect(name, picture)
        assert (answer["category"], answer["version"]) == (name, 1)
        assert answer["threshold"] == pytest.approx(threshold)
        assert answer["anomaly_score"] == pytest.approx(expected.anomaly_score, abs=1e-4)
        assert answer["is_anomalous"] == (expected.anomaly_score > threshold)
        _say(deployed, name, answer)
    for page in ("/", "/docs", "/healthz", "/readyz", "/v1", "/v1/blister", "/console/app.js"):
        assert fetch(Request(deployed.url + page))
    for name, content, status in (
        ("screw", picture, 404),
        ("blister", bytes(21 * 2**20), 413),
        ("washer", bytes(21 * 2**20), 413),
        ("blister", picture[:30], 400),
        ("washer", picture[:30], 400),
    ):
        response = httpx.post(f"{deployed.url}/v1/{name}/inspect", content=content, **_ASKING)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["remedy"]

    # Headers that Serve's own servers cannot read, and orders that are no caller's to give.
    for name in (b"X-Request-ID", b"X-Session-Id", b"X-Request-Timeout-Seconds"):
        for value in (b"Stra\xdfe", b"0.001", b"7" * 7000):
            answer = httpx.post(
                f"{deployed.url}/v1/blister/inspect",
                content=picture,
                headers=[(name, value)],
                **_ASKING,
            )
            assert answer.status_code == 200, (name, value)
            if name == b"X-Request-ID":
                assert answer.headers["x-request-id"] == answer.json()["request_id"]
                assert (answer.json()["request_id"] == "0.001") is (value == b"0.001")
    head = httpx.head(f"{deployed.url}/healthz", **_ASKING)
    assert (head.status_code, head.content) == (200, b"")
    _check_proxy(deployed)

    # The registry decides on versions: a moved alias is followed and taken back under requests.
    before = deployed.replicas()
    with Load(deployed.url, ("blister", "washer"), picture, per_second=4) as load:
        deployed.register(prompt_set, "blister", "washer", champion=True)
        for name in ("blister", "washer"):
            assert load.wait_for(name, 2) < 15
        deployed.promote("washer", 1)
        assert load.wait_for("washer", 1) < 15
        # The candidate answers beside it, and is loaded for that alone.
        for name in ("washer", "blister"):
            assert deployed.inspect(name, picture, query="?alias=candidate")["version"] == 2
        # Bounds, decisions and tokens change without a new process.
        fleet = {
            "categories": {
                "blister": {"autoscaling": {"target_ongoing_requests": 8}},
                "washer": {"pool": "tail", "threshold": 0.25},
            }
        }
        done = deployed.deploy(TAIL | fleet)
    assert done.returncode == 0, done.stderr
    assert load.failed() == []
    assert "root: unchanged" in done.stderr
    assert "washer: changed in pool tail" in done.stderr
    assert deployed.replicas() == before
    assert deployed.inspect("washer", picture)["threshold"] == 0.25
    washer = deployed.get("/fleet/status")["categories"]["washer"]
    assert (washer["serving"], washer["candidate"], washer["threshold"]) == ([1], 2, 0.25)
    assert washer["last_hour"]["inspected"] == sum(washer["last_hour"]["scores"]) > 0

    _check_history_and_threshold(deployed, picture)
    # A candidate that differs: it passes what serves rejects, or the other way round.
    threshold = 1.0 if expected.anomaly_score > prompt_set.threshold.value else 0.0
    other = prompt_set.with_threshold(prompt_set.threshold.moved_to(threshold))
    _check_shadow(deployed, other, picture)
    _check_moves(deployed)

    # What cannot be served is reported with its reason; what was there keeps serving.
    bad = {"blister": {}, "washer": {"pool": "tail", "false_alarm_rate": 0.1}}
    done = deployed.deploy(TAIL | {"categories": bad})
    assert done.returncode == 1
    assert "washer cannot be held to a false-alarm rate of 0.1" in done.stderr
    assert "version 1 keeps serving" in done.stderr
    assert deployed.inspect("washer", picture)["threshold"] == 0.25
    status = deployed.run("status")
    assert "FAILED" in status.stdout
    states = {link["category"]: link["status"] for link in deployed.get("/v1")["categories"]}
    assert states == {"blister": "READY", "washer": "FAILED"}
    operations = {line["operation"] for line in deployed.get("/fleet/audit")["lines"]}
    assert {"deploy", "alias moved", "serve"} <= operations

    # A search is a job on the same Ray, which finds Ray, the registry and its own code.
    wanted = {"category": "washer", "data": str(deployed.folder / "nowhere"), "trials": 1}
    started = httpx.post(f"{deployed.url}/fleet/searches", json=wanted, **_ASKING)
    assert started.status_code == 202, started.text
    address = f"/fleet/searches/{started.json()['id']}"
    deadline = time.monotonic() + 120
    while (search := deployed.get(address))["ended_at"] is None:
        assert time.monotonic() < deadline, search
        time.sleep(0.5)
    assert (search["state"], search["category"]) == ("failed", "washer")
    assert f"{deployed.folder / 'nowhere'} is not a folder" in search["problem"], search

    _check_metrics(deployed)

    # What others keep on the same server is no category, and one that no replica can serve holds up
    # no other: neither a new one, nor one that moves.
    client = MlflowClient(deployed.tracking_uri)
    client.create_registered_model("apt-portfolio")
    run = client.create_run(client.create_experiment("somebody else's"))
    source = f"runs:/{run.info.run_id}/model"
    client.create_model_version("apt-portfolio", source, run_id=run.info.run_id)
    client.set_registered_model_alias("apt-portfolio", "champion", "1")
    deployed.register(prompt_set, "nut")
    deployed.register(make_prompt_set("odd"), "odd")
    few = {"defaults": {"num_cpus": 0.1, "autoscaling": {"max_replicas": 1}}}
    done = deployed.deploy(few | {"categories": "all"})
    assert done.returncode == 1
    assert "odd cannot be served: " in done.stderr
    assert "load the backbone that it names" in done.stderr
    assert "portfolio" not in done.stderr
    for name in ("blister", "washer", "nut"):
        assert deployed.inspect(name, picture)["version"]
    moving = {"nut": {"pool": "tail", "false_alarm_rate": 0.1}, "blister": {"pool": "tail"}}
    done = deployed.deploy(TAIL | few | {"categories": moving | {"absent": {"pool": "tail"}}})
    assert done.returncode == 1
    assert "nut cannot be served: nut cannot be held to" in done.stderr
    assert "absent cannot be served: the registry" in done.stderr
    assert set(deployed.replicas()) == {"controller", "root", "pool-nut", "pool-tail"}
    for name in ("blister", "nut"):
        assert deployed.inspect(name, picture)["version"]
    deployed.register(prompt_set, "absent")
    done = deployed.deploy(TAIL | few | {"categories": {"absent": {"pool": "tail"}}})
    assert done.returncode == 0, done.stderr
    assert deployed.inspect("absent", picture)["version"] == 1

    # HTTP options are fixed while the server runs.
    moved = deployed.run("deploy", str(deployed.folder / "fleet.yaml"), "--http-port", "1")
    assert moved.returncode == 1
    assert f"port {deployed.port}, not 1" in moved.stderr

    done = deployed.run("down")
    assert done.returncode == 0, done.stderr
    assert "stopped 3 applications" in done.stdout
    with pytest.raises(httpx.ConnectError):
        httpx.get(deployed.url, **_ASKING)


def _say(deployed: Deployed, category: str, answer: dict[str, Any]) -> None:
    """What was inspected is called the opposite, and an operator asks what would come of it."""
    label = "false_alarm" if answer["is_anomalous"] else "missed_defect"
    said = {"request_id": answer["request_id"], "label": label}
    place = f"{deployed.url}/v1/{category}/feedback"
    deadline = time.monotonic() + 20
    while (given := httpx.post(place, json=said, **_ASKING)).status_code == 404:
        assert time.monotonic() < deadline  # the history writes behind the answers
    assert given.status_code == 200, given.text
    assert deployed.get(f"/v1/{category}/feedback")["feedback"] == [given.json()]
    begun = httpx.post(
        f"{deployed.url}/fleet/categories/{category}/accept-feedback",
        json={"reason": "tried", "dry_run": True},
        **_ASKING,
    )
    assert begun.status_code == 202, begun.text
    while (told := deployed.get(f"/fleet/operations/{begun.json()['id']}"))["state"] == "running":
        time.sleep(0.2)
    if label == "false_alarm":
        assert (told["state"], told["result"]["version"]) == ("done", 0), told
    else:
        assert "none was reported" in told["error"]


def _check_proxy(deployed: Deployed) -> None:
    """HAProxy takes the requests in, and opens no port beside the fleet's."""
    listening = {
        connection.laddr
        for process in ray_workers(deployed.stack, "bin/haproxy")
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", deployed.port)}


def _check_moves(deployed: Deployed) -> None:
    """Operators decide on versions over HTTP; a promotion runs in a task of its own."""
    address = f"{deployed.url}/fleet/categories/washer"
    listed = httpx.get(f"{address}/versions", **_ASKING).json()["versions"]
    assert [each["version"] for each in listed] == [2, 1]
    asked: dict[str, object] = {"reason": "it was tried in the morning", "required_images": 10_000}
    refused = httpx.post(f"{address}/promote", json=asked, **_ASKING)
    assert (refused.status_code, refused.json()["title"]) == (409, "Not tried enough")
    assert "version 2 of washer agrees with version 1" in refused.json()["detail"]
    asked["required_images"] = 1
    begun = httpx.post(f"{address}/promote", json=asked, **_ASKING)
    assert begun.status_code == 202, begun.text
    deadline = time.monotonic() + 120
    while (operation := deployed.get(begun.headers["location"]))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert operation["error"] is None
    assert (operation["result"]["moved"], operation["result"]["verdict"]) == (False, "uncomparable")


def _check_history_and_threshold(deployed: Deployed, picture: bytes) -> None:
    """Both pools keep what they inspect, and follow an operator, by whatever way they are asked."""
    because = {"reason": "dust on the lens"}
    with httpx.Client(base_url=deployed.url, **_ASKING) as client:

        def follows(category: str, source: str) -> float:
            deadline = time.monotonic() + 60
            while (about := client.get(f"/v1/{category}").json())["threshold_source"] != source:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            threshold: float = about["threshold"]
            return threshold

        for name in ("blister", "washer"):
            request = deployed.inspect(name, picture)["request_id"]
            history, deadline = f"/v1/{name}/history", time.monotonic() + 60
            while (kept := client.get(history).json()["inspections"])[0]["request_id"] != request:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert len(kept) <= 5
            place = f"{history}/{kept[0]['id']}"
            types = [client.get(f"{place}/{of}").headers["content-type"] for of in ("image", "map")]
            assert types == ["image/jpeg", "image/png"]
            marked = client.post(f"{place}/mark", json={"verdict": "good"}).json()
            assert marked == kept[0] | {"mark": "good", "marked_by": ""}
            assert client.get(f"{history}/17/image").status_code == 404

            address = f"/fleet/categories/{name}/threshold"
            before = client.get(address).json()["source"]
            said = client.put(address, json={"threshold": 0.41, **because})
            assert (said.status_code, said.json()["source"]) == (200, "operator")
            assert follows(name, "operator") == 0.41
            taken_back = client.request("DELETE", address, json=because).json()
            assert taken_back["source"] == before
            follows(name, before)


def _check_shadow(deployed: Deployed, other: PromptSet, picture: bytes) -> None:
    """Candidates are tried behind the answers, in both pools; one that differs is told."""
    deployed.register(other, "blister")
    with httpx.Client(base_url=deployed.url, **_ASKING) as client:
        for name, champion, candidate, agreement in (("washer", 1, 2, 1.0), ("blister", 2, 3, 0.0)):
            deadline = time.monotonic() + 60
            found: dict[str, Any] = {}
            while not (found.get("images") and (agreement or found["disagreements"])):
                assert time.monotonic() < deadline, found
                deployed.inspect(name, picture)
                time.sleep(0.5)
                found = client.get(f"/v1/{name}/shadow").json()
            assert (found["champion"], found["candidate"]) == (champion, candidate)
            assert (found["agreement"], found["shift_p50"]) == (agreement, 0.0)
            for kept in found["disagreements"]:
                assert kept["candidate"]["is_anomalous"] != kept["is_anomalous"]
            assert bool(found["disagreements"]) is not bool(agreement)
        place = f"/v1/blister/history/{found['disagreements'][0]['id']}/image"
        assert client.get(place).headers["content-type"] == "image/jpeg"
    assert "shadow: version 2 beside 1 agrees on 100.00% of" in deployed.run("status").stdout


def _check_metrics(deployed: Deployed) -> None:
    """Ray's agent exports what the replicas count."""
    assert deployed.stack.ray_folder is not None
    targets = deployed.stack.ray_folder / "prom_metrics_service_discovery.json"
    exported = ""
    for group in json.loads(targets.read_text()):
        for target in group["targets"]:
            # Every Ray of a machine has its autoscaler at the same port: another one may hold it,
            # or may just have ended.
            with suppress(AptError):
                exported += fetch(Request(f"http://{target}/metrics")).decode()
    for name in (
        "requests_total",
        "rejects_total",
        "stage_seconds_bucket",
        "anomaly_score_sum",
        "shadow_total",
    ):
        assert f"ray_apt_{name}" in exported
    line = next(
        line
        for line in exported.splitlines()
        if "apt_requests_total" in line and 'category="washer"' in line and 'outcome="ok"' in line
    )
    assert 'version="1"' in line or 'version="2"' in line
