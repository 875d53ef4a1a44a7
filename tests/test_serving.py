import asyncio
import base64
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from apt_ray.backbone import FrozenCLIP
from apt_ray.calibration import calibrate
from apt_ray.data.folders import Category
from apt_ray.detector import Detector
from apt_ray.errors import FleetError
from apt_ray.images import decode_image, read_image
from apt_ray.local_stack import LocalStack, command_environment, fetch, free_ports
from apt_ray.prompt_set import PromptSet
from apt_ray.registry import RegisteredVersion, Registry
from serving.ingress import create_api
from serving.inspector import Inspector, decide
from serving.messages import CategoryReport, InspectedImage
from serving.root import create_root_api
from serving.settings import Auth, Batching, Decision, HttpLimits

LIMITS = HttpLimits(max_bytes=200_000, max_pixels=100_000, timeout_s=20)
TOKEN = {"name": "line-3", "sha256": hashlib.sha256(b"secret").hexdigest()}
AUTH = Auth.parse({"tokens": [TOKEN, {"name": "line-4", "sha256": "0" * 64}]})
DEFAULT_BATCHING = Batching()
REGISTERED = RegisteredVersion(
    category="blister", version=7, aliases=("champion",), run_id="run", tags={}
)


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def with_threshold(prompt_set: PromptSet, value: float) -> PromptSet:
    return decide(prompt_set, Decision(threshold=value))


def inspector(
    backbone: FrozenCLIP, prompt_set: PromptSet, batching: Batching = DEFAULT_BATCHING
) -> Inspector:
    return Inspector(
        Detector(backbone, prompt_set), REGISTERED, limits=LIMITS.image, batching=batching
    )


@pytest.fixture(scope="module")
def alarmed(backbone: FrozenCLIP, prompt_set: PromptSet) -> Inspector:
    """An inspector to whom everything is a defect."""
    return inspector(backbone, with_threshold(prompt_set, 0.0))


@pytest.fixture(scope="module")
def api(alarmed: Inspector) -> FastAPI:
    return create_api(alarmed, http=LIMITS, auth=Auth())


def ask(api: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        # As under Serve's proxy, which mounts an application at its route prefix.
        transport = httpx.ASGITransport(api, root_path="/v1/blister", raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def inspect(api: FastAPI, content: Any, **request: Any) -> httpx.Response:
    return ask(api, "POST", "/v1/blister/inspect", content=content, **request)


def assert_problem(response: httpx.Response, status: int, says: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "remedy"}
    assert problem["status"] == status
    assert says in problem["detail"]
    assert problem["remedy"]
    return problem


def test_an_answer_says_what_the_detector_found(
    api: FastAPI,
    alarmed: Inspector,
    backbone: FrozenCLIP,
    prompt_set: PromptSet,
    category: Category,
) -> None:
    path = next(image.path for image in category.test if image.is_anomalous)
    detector = Detector(backbone, with_threshold(prompt_set, 0.0))
    (expected,) = detector.inspect([read_image(path)])
    answer = inspect(api, path.read_bytes(), headers={"X-Request-ID": "abc"}).json()
    assert answer["anomaly_score"] == pytest.approx(expected.anomaly_score, abs=1e-5)
    assert (answer["threshold"], answer["is_anomalous"]) == (0.0, True)
    assert answer["regions"][0]["area"] == expected.regions[0].area
    assert answer["regions"][0]["peak"] == pytest.approx(expected.regions[0].peak, abs=1e-5)
    assert (answer["category"], answer["version"]) == (prompt_set.category, 7)
    assert (answer["backbone"], answer["request_id"]) == ("builtin", "abc")
    assert answer["p_value"] is answer["certified_false_alarm_rate"] is answer["map_png"] is None
    assert set(answer["timings_ms"]) == {"receive", "decode", "queue", "inspect"}
    assert all(value >= 0 for value in answer["timings_ms"].values())


def test_the_map_comes_along_when_asked_for(
    api: FastAPI, backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    path = category.test[0].path
    answer = inspect(api, path.read_bytes(), params={"map": "png"}).json()
    sent = Image.open(io.BytesIO(base64.b64decode(answer["map_png"])))
    (expected,) = Detector(backbone, prompt_set).inspect([read_image(path)])
    np.testing.assert_allclose(
        np.asarray(sent, dtype=np.float32) / 65535, expected.anomaly_map, atol=1e-4
    )


@pytest.mark.parametrize("how", ["accept", "query"])
def test_the_overlay_has_the_size_of_the_image_and_is_not_the_image(
    api: FastAPI, category: Category, how: str
) -> None:
    path = category.test[0].path
    if how == "accept":
        response = inspect(api, path.read_bytes(), headers={"Accept": "image/png"})
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-is-anomalous"] == "true"
        assert response.headers["x-prompt-set-version"] == "7"
        data = response.content
    else:
        answer = inspect(api, path.read_bytes(), params={"map": "overlay"}).json()
        data = base64.b64decode(answer["map_png"])
    overlay, image = decode_image(data), read_image(path)
    assert overlay.size == image.size
    assert not np.array_equal(np.asarray(overlay), np.asarray(image))


@pytest.mark.parametrize(
    "content_type",
    [None, "image/png", "application/octet-stream", "application/x-www-form-urlencoded"],
)
def test_a_raw_body_is_accepted_as_clients_send_it(api: FastAPI, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert inspect(api, png(), headers=headers).status_code == 200


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_form_gives_the_same_answer_as_a_raw_body(api: FastAPI, image_format: str) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, image_format)
    raw = inspect(api, buffer.getvalue()).json()
    file = ("part", buffer.getvalue(), "application/octet-stream")
    form = ask(
        api, "POST", "/v1/blister/inspect", files={"anything": file}, data={"note": "x"}
    ).json()
    assert form["anomaly_score"] == raw["anomaly_score"]


def test_a_bad_image_is_the_callers_problem(api: FastAPI) -> None:
    truncated = png(200, 200)[:-100]
    assert_problem(inspect(api, truncated), 400, "damaged")
    for junk in (b"", b"not an image", b"\x89PNG\r\n\x1a\nnothing"):
        assert_problem(inspect(api, junk), 400, "image")
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    assert_problem(inspect(api, gif.getvalue()), 415, "PNG, JPEG, BMP, TIFF or WebP")
    headers = {"Content-Type": "application/json"}
    assert_problem(inspect(api, b"{}", headers=headers), 415, "application/json")
    form = ask(api, "POST", "/v1/blister/inspect", data={"a": "b"}, files={})
    assert form.status_code in (400, 415)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(inspect(api, b"garbage", headers=headers), 400, "")
    empty_form = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
    assert_problem(inspect(api, empty_form, headers=headers), 400, "no file")


def test_too_many_bytes_are_refused_before_they_are_read(api: FastAPI) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 50_000
            yield bytes(50_000)

    # Refused for what is announced, without reading; or as soon as the limit is passed.
    announced = {"Content-Length": "200001"}
    assert_problem(inspect(api, endless(), headers=announced), 413, "200,000 bytes")
    assert read <= 50_000
    assert_problem(inspect(api, endless()), 413, "200,000 bytes")
    assert read <= 400_000


def test_too_many_pixels_are_refused(api: FastAPI) -> None:
    assert_problem(inspect(api, png(400, 251)), 413, "400 x 251 pixels")


def test_an_image_that_does_not_arrive_in_time_is_given_up(alarmed: Inspector) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield png()[:20]
        await asyncio.sleep(30)

    api = create_api(alarmed, http=HttpLimits(timeout_s=0.1), auth=Auth())
    assert_problem(inspect(api, stalled()), 408, "0.1 s")


def test_wrong_parameters_and_addresses_are_problems_too(api: FastAPI) -> None:
    assert_problem(inspect(api, png(), params={"map": "tiff"}), 422, "'png' or 'overlay'")
    assert_problem(ask(api, "GET", "/v1/blister/inspect"), 405, "/v1/blister/inspect")
    assert_problem(ask(api, "GET", "/v1/blister/nothing"), 404, "/v1/blister/nothing")


def test_a_failure_of_the_service_itself_tells_nothing_of_its_inside() -> None:
    class Broken:
        async def describe(self, category: str) -> CategoryReport:
            raise RuntimeError("the secret of the inside")

        async def inspect(self, category: str, data: bytes) -> InspectedImage:
            raise RuntimeError("the secret of the inside")

    response = inspect(create_api(Broken(), http=LIMITS, auth=Auth()), png())
    assert_problem(response, 500, "")
    assert "secret" not in response.text


def test_a_category_tells_what_answers_for_it(api: FastAPI, prompt_set: PromptSet) -> None:
    answer = ask(api, "GET", "/v1/blister").json()
    assert answer["version"] == 7
    assert answer["aliases"] == ["champion"]
    assert answer["fingerprint"] == prompt_set.fingerprint
    assert answer["threshold"] == 0.0
    assert answer["trained_at"] == prompt_set.provenance.created
    assert answer["shots"] == prompt_set.provenance.shots
    assert answer["settings"]["steps"] == prompt_set.settings.steps


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic secret", 401), ("Bearer secret", 200)],
)
def test_only_a_known_token_lets_a_request_pass(
    alarmed: Inspector, header: str | None, status: int
) -> None:
    headers = {"Authorization": header} if header else {}
    category = create_api(alarmed, http=LIMITS, auth=AUTH)
    root = create_root_api(("blister",), dict, http=LIMITS, auth=AUTH)
    for response in (
        inspect(category, png(), headers=headers),
        ask(category, "GET", "/v1/blister", headers=headers),
        ask(root, "GET", "/v1", headers=headers),
    ):
        assert response.status_code == status
        if status == 401:
            assert_problem(response, 401, "token")
            assert response.headers["www-authenticate"].startswith("Bearer")
    for open_to_all in ("/", "/docs", "/openapi.json", "/healthz"):
        assert ask(root, "GET", open_to_all).status_code == 200


def test_the_root_explains_what_it_cannot_inspect() -> None:
    statuses = {"blister": "RUNNING", "washer": "DEPLOYING"}
    root = create_root_api(("blister", "washer"), lambda: statuses, http=LIMITS, auth=Auth())
    unknown = ask(root, "POST", "/v1/screw/inspect", content=png())
    assert "blister, washer" in assert_problem(unknown, 404, "'screw'")["remedy"]
    early = ask(root, "POST", "/v1/washer/inspect", content=png())
    assert_problem(early, 503, "washer")
    assert int(early.headers["retry-after"]) > 0
    assert_problem(ask(root, "GET", "/readyz"), 503, "washer")
    assert ask(root, "GET", "/v1").json()["categories"] == [
        {"category": "blister", "inspect": "/v1/blister/inspect", "status": "RUNNING"},
        {"category": "washer", "inspect": "/v1/washer/inspect", "status": "DEPLOYING"},
    ]
    statuses["washer"] = "RUNNING"
    assert ask(root, "GET", "/readyz").json() == {"status": "ok"}


def test_the_description_names_the_routes_and_the_pages_load_nothing_from_elsewhere() -> None:
    root = create_root_api(("blister",), dict, http=LIMITS, auth=Auth())
    paths = ask(root, "GET", "/openapi.json").json()["paths"]
    operation = paths["/v1/{category}/inspect"]["post"]
    assert {"image/png", "multipart/form-data"} <= set(operation["requestBody"]["content"])
    assert {"200", "400", "401", "404", "408", "413", "415", "503"} <= set(operation["responses"])
    assert {"/v1", "/v1/{category}", "/healthz", "/readyz"} <= set(paths)
    for path in ("/", "/docs"):
        page = ask(root, "GET", path)
        assert "default-src 'self'" in page.headers["content-security-policy"]
        links = [part.split('"')[0] for part in page.text.split('src="')[1:]]
        links += [part.split('"')[0] for part in page.text.split('href="')[1:]]
        assert links
        for link in links:
            assert ask(root, "GET", link).status_code == 200, link


def test_images_that_wait_together_are_inspected_together(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    images = [image.path.read_bytes() for image in category.test[:5]]

    async def together(inspecting: Inspector) -> list[tuple[float, float]]:
        found = await asyncio.gather(*(inspecting.inspect("blister", data) for data in images))
        return [(each.inspection.anomaly_score, each.inspect_ms) for each in found]

    alone = inspector(backbone, prompt_set, Batching(max_batch_size=1))
    batched = inspector(backbone, prompt_set, Batching(max_batch_size=4))
    scores, durations = zip(*asyncio.run(together(batched)), strict=True)
    expected, _ = zip(*asyncio.run(together(alone)), strict=True)
    assert scores == pytest.approx(expected, abs=1e-5)
    # Images of one batch share its duration; one that came too early or too late has its own.
    assert len(set(durations)) < len(images)


def test_a_full_queue_answers_busy(backbone: FrozenCLIP, prompt_set: PromptSet) -> None:
    small = inspector(backbone, prompt_set, Batching(max_queue=2))
    api = create_api(small, http=LIMITS, auth=Auth())

    async def rush() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            requests = [client.post("/v1/blister/inspect", content=png()) for _ in range(6)]
            return await asyncio.gather(*requests)

    responses = asyncio.run(rush())
    refused = [response for response in responses if response.status_code != 200]
    assert 1 <= len(refused) <= 4
    for response in refused:
        assert_problem(response, 503, "waiting")
        assert response.headers["retry-after"] == "1"
    assert inspect(api, png()).status_code == 200


def test_the_fleet_files_decision_replaces_the_threshold(prompt_set: PromptSet) -> None:
    assert decide(prompt_set, Decision()).threshold == prompt_set.threshold
    fixed = decide(prompt_set, Decision(threshold=0.25)).threshold
    assert (fixed.value, fixed.certified) == (0.25, False)
    with pytest.raises(FleetError, match="no calibration images, 19 are needed"):
        decide(prompt_set, Decision(false_alarm_rate=0.05))

    scores = [score / 100 for score in range(1, 20)]
    provenance = prompt_set.provenance.model_copy(update={"threshold": calibrate(scores, 0.5)})
    calibrated = dataclasses.replace(prompt_set, provenance=provenance)
    strict = decide(calibrated, Decision(false_alarm_rate=0.05)).threshold
    assert strict == calibrate(scores, 0.05)
    with pytest.raises(FleetError, match="only 19 calibration images, 99 are needed"):
        decide(calibrated, Decision(false_alarm_rate=0.01))


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A real cluster, registry and fleet, used through the commands and HTTP alone."""

    stack: LocalStack
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "serving.fleet", *arguments],
            cwd=self.folder,  # not the repository: nothing may depend on where it runs
            env=command_environment() | self.stack.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def deploy(self, fleet: Mapping[str, object]) -> "subprocess.CompletedProcess[str]":
        path = self.folder / "fleet.yaml"
        path.write_text(json.dumps(fleet))
        return self.run("deploy", str(path), "--http-port", str(self.port))

    def replicas(self) -> dict[str, int]:
        """Application -> process of its only replica."""
        token = Path(self.stack.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = Request(
            f"{self.stack.environment['RAY_API_SERVER_ADDRESS']}/api/serve/applications/",
            headers={"Authorization": f"Bearer {token}"},
        )
        applications = json.loads(fetch(request))["applications"]
        return {
            name: deployment["replicas"][0]["pid"]
            for name, application in applications.items()
            for deployment in application["deployments"].values()
        }

    def inspect(self, category: str, data: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            fetch(Request(f"{self.url}/v1/{category}/inspect", data=data))
        )
        return answer


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, prompt_set: PromptSet) -> Iterator[Deployed]:
    """A fleet of two categories, one of which calls everything a defect."""
    folder = tmp_path_factory.mktemp("fleet")
    stack = LocalStack(folder / "stack")
    stack.start()
    try:
        registry = Registry(stack.environment["MLFLOW_TRACKING_URI"])
        for name in ("blister", "washer"):
            provenance = prompt_set.provenance.model_copy(update={"category": name})
            named = dataclasses.replace(prompt_set, provenance=provenance)
            registry.register(named, pictures={}, trials=[])
        fleet = Deployed(stack=stack, port=free_ports(1)[0], folder=folder)
        done = fleet.deploy({"categories": {"blister": {"threshold": 0}, "washer": {}}})
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
    (expected,) = Detector(backbone, prompt_set).inspect([read_image(path)])

    # Each category answers over HTTP as the detector does, by its own decision.
    for name, threshold in (("blister", 0.0), ("washer", prompt_set.threshold.value)):
        answer = deployed.inspect(name, path.read_bytes())
        assert (answer["category"], answer["version"]) == (name, 1)
        assert answer["threshold"] == pytest.approx(threshold)
        assert answer["anomaly_score"] == pytest.approx(expected.anomaly_score, abs=1e-4)
        assert answer["is_anomalous"] == (expected.anomaly_score > threshold)
    for page in ("/", "/docs", "/healthz", "/readyz", "/v1", "/v1/blister", "/console/console.js"):
        assert fetch(Request(deployed.url + page))
    for name, content, status in (
        ("screw", png(), 404),
        ("blister", bytes(21 * 2**20), 413),
        ("blister", png()[:30], 400),
    ):
        response = httpx.post(f"{deployed.url}/v1/{name}/inspect", content=content, trust_env=False)
        assert_problem(response, status, "")

    # A new version and a new bound: only what is built anew gets a new process, without a gap.
    registry = Registry(deployed.stack.environment["MLFLOW_TRACKING_URI"])
    provenance = prompt_set.provenance.model_copy(update={"category": "blister"})
    registry.register(
        dataclasses.replace(prompt_set, provenance=provenance), pictures={}, trials=[]
    )
    before = deployed.replicas()
    fleet = {
        "categories": {
            "blister": {"version": 2},
            "washer": {"autoscaling": {"max_replicas": 2}},
        }
    }
    done = deployed.deploy(fleet)
    assert done.returncode == 0, done.stderr
    assert "root: unchanged" in done.stderr
    after = deployed.replicas()
    assert {name for name in before if before[name] != after[name]} == {"category-blister"}
    assert deployed.inspect("blister", png())["version"] == 2

    # A category that cannot be served is reported with its reason; what was there keeps serving.
    done = deployed.deploy(
        {"categories": {"blister": {"version": 2}, "washer": {"false_alarm_rate": 0.1}}}
    )
    assert done.returncode == 1
    assert "category-washer cannot be served" in done.stderr
    assert "washer cannot be held to a false-alarm rate of 0.1" in done.stderr
    assert deployed.inspect("washer", png())["version"] == 1
    status = deployed.run("status")
    assert "DEPLOY_FAILED" in status.stdout

    # HTTP options are fixed while the server runs.
    moved = deployed.run("deploy", str(deployed.folder / "fleet.yaml"), "--http-port", "1")
    assert moved.returncode == 1
    assert f"port {deployed.port}, not 1" in moved.stderr

    done = deployed.run("down")
    assert done.returncode == 0, done.stderr
    assert "stopped 3 applications" in done.stdout
    with pytest.raises(httpx.ConnectError):
        httpx.get(deployed.url, trust_env=False)
