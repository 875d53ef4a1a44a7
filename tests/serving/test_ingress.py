import asyncio
import base64
import dataclasses
import gc
import hashlib
import io
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import AptError, MissingDependencyError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import decode_image, read_image
from apt_ray.prompts.confirm import confirm
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.messages import CategoryReport, Inspected, InspectionRequest, Picture
from serving.api.problems import ProblemError
from serving.controller.cache import Cache
from serving.controller.orders import Order, StoredVersion
from serving.replica.beside import Beside
from serving.replica.inspector import Inspector
from serving.replica.served import decide
from serving.settings import Auth, Batching, Decision, HttpLimits, RegionOfInterest
from tests.serving.engines import torch_inspector

LIMITS = HttpLimits(max_bytes=200_000, max_pixels=100_000, timeout_s=20)
TOKEN = {"name": "line-3", "sha256": hashlib.sha256(b"secret").hexdigest()}
AUTH = Auth.parse({"tokens": [TOKEN, {"name": "line-4", "sha256": "0" * 64}]})
DEFAULT_BATCHING = Batching()
OPEN = Access(Auth())


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def with_threshold(prompt_set: PromptSet, value: float) -> PromptSet:
    return decide(prompt_set, Decision(threshold=value))


def inspector(
    backbone: FrozenCLIP, prompt_set: PromptSet, batching: Batching = DEFAULT_BATCHING
) -> Inspector:
    return loaded(torch_inspector(limits=LIMITS.image, batching=batching), prompt_set)


def loaded(inspecting: Inspector, prompt_set: PromptSet) -> Inspector:
    stored = StoredVersion(category="blister", version=7, run_id="run", data=prompt_set.to_bytes())
    inspecting.load("blister", Order(version=7), stored)
    return inspecting


async def ask_for(
    inspecting: Inspector, data: bytes, name: str = "blister", picture: Picture | None = None
) -> Inspected:
    return await inspecting.inspect(name, data, InspectionRequest(picture=picture))


@pytest.fixture(scope="module")
def alarmed(backbone: FrozenCLIP, prompt_set: PromptSet) -> Inspector:
    """An inspector to whom everything is a defect."""
    return inspector(backbone, with_threshold(prompt_set, 0.0))


@pytest.fixture(scope="module")
def api(alarmed: Inspector) -> FastAPI:
    return create_api(alarmed, http=LIMITS, access=OPEN)


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
    assert set(answer["timings_ms"]) == {"receive", "decode", "queue", "inspect", "conclude"}
    assert all(value >= 0 for value in answer["timings_ms"].values())


def test_an_answer_names_the_kind_where_defects_were_confirmed(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    defects = category.draw_defects(1, seed=0)
    taught = confirm(with_threshold(prompt_set, 0.0), defects, backbone).prompt_set
    api = create_api(inspector(backbone, taught), http=LIMITS, access=OPEN)
    data = defects[0].path.read_bytes()
    kinds = inspect(api, data).json()["kinds"]
    assert set(kinds) == {defect.kind for defect in defects}
    assert sum(kinds.values()) == pytest.approx(1)
    assert max(kinds, key=kinds.__getitem__) == defects[0].kind
    passing = with_threshold(taught, 1.0)
    api = create_api(inspector(backbone, passing), http=LIMITS, access=OPEN)
    assert inspect(api, data).json()["kinds"] == {}


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


@pytest.mark.parametrize("picture", ["png", "overlay"])
def test_a_picture_is_as_small_as_it_is_wanted_and_regions_stay_where_they_are(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category, picture: str
) -> None:
    path = next(image.path for image in category.test if image.is_anomalous)
    image = read_image(path).resize((400, 200))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (found,) = Detector(backbone, prompt_set).inspect([image])
    api = create_api(
        inspector(backbone, with_threshold(prompt_set, found.anomaly_score * 0.9)),
        http=LIMITS,
        access=OPEN,
    )

    def ask_at(**params: str | int) -> tuple[dict[str, Any], Image.Image]:
        answer = inspect(api, buffer.getvalue(), params={"map": picture, **params}).json()
        return answer, Image.open(io.BytesIO(base64.b64decode(answer["map_png"])))

    whole, large = ask_at()
    small, drawn = ask_at(map_side=100)
    _, same = ask_at(map_side=4096)
    assert large.size == same.size == (whole["width"], whole["height"]) == (400, 200)
    assert drawn.size == (100, 50)
    assert small["regions"] == whole["regions"] != []
    shrunk = np.asarray(large.resize(drawn.size, Image.Resampling.BOX), dtype=np.float32)
    scale = 65535 if picture == "png" else 255
    apart = np.abs(shrunk - np.asarray(drawn, dtype=np.float32)).mean() / scale
    assert apart < (0.005 if picture == "png" else 0.1)  # outlines are as thin, so less of it
    for side in (63, 4097):
        refused = inspect(api, png(), params={"map_side": side})
        assert_problem(refused, 422, "map_side")


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
    for bytes_announced in ("200001", "9" * 5000):
        announced = {"Content-Length": bytes_announced}
        assert_problem(inspect(api, endless(), headers=announced), 413, "200,000 bytes")
    assert read <= 100_000
    assert_problem(inspect(api, endless()), 413, "200,000 bytes")
    assert read <= 400_000


def test_too_many_pixels_are_refused(api: FastAPI) -> None:
    assert_problem(inspect(api, png(400, 251)), 413, "400 x 251 pixels")


def test_an_image_that_does_not_arrive_in_time_is_given_up(alarmed: Inspector) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield png()[:20]
        await asyncio.sleep(30)

    api = create_api(alarmed, http=HttpLimits(timeout_s=0.1), access=OPEN)
    assert_problem(inspect(api, stalled()), 408, "0.1 s")


def test_wrong_parameters_and_addresses_are_problems_too(api: FastAPI) -> None:
    assert_problem(inspect(api, png(), params={"map": "tiff"}), 422, "'png' or 'overlay'")
    assert_problem(ask(api, "GET", "/v1/blister/inspect"), 405, "/v1/blister/inspect")
    assert_problem(ask(api, "GET", "/v1/blister/nothing"), 404, "/v1/blister/nothing")


def test_a_failure_of_the_service_itself_tells_nothing_of_its_inside() -> None:
    class Broken:
        async def describe(self, category: str) -> CategoryReport:
            raise RuntimeError("the secret of the inside")

        async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
            raise RuntimeError("the secret of the inside")

    response = inspect(create_api(Broken(), http=LIMITS, access=OPEN), png())
    assert_problem(response, 500, "")
    assert "secret" not in response.text


def test_a_category_tells_what_answers_for_it(api: FastAPI, prompt_set: PromptSet) -> None:
    answer = ask(api, "GET", "/v1/blister").json()
    assert answer["version"] == 7
    assert answer["run_id"] == "run"
    assert answer["fingerprint"] == prompt_set.fingerprint
    assert answer["threshold"] == 0.0
    assert answer["trained_at"] == prompt_set.provenance.created
    assert answer["shots"] == prompt_set.provenance.shots
    assert answer["settings"]["steps"] == prompt_set.settings.steps


def test_images_that_wait_together_are_inspected_together(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    images = [image.path.read_bytes() for image in category.test[:5]]

    async def together(inspecting: Inspector) -> list[tuple[float, float]]:
        found = await asyncio.gather(*(ask_for(inspecting, data) for data in images))
        return [(each.report.anomaly_score, each.report.timings_ms.inspect) for each in found]

    alone = inspector(backbone, prompt_set, Batching(max_batch_size=1, max_wait_s=60))
    batching = Batching(max_batch_size=4, threads=4, max_wait_s=60)
    batched = inspector(backbone, prompt_set, batching)
    scores, durations = zip(*asyncio.run(together(batched)), strict=True)
    expected, _ = zip(*asyncio.run(together(alone)), strict=True)
    assert scores == pytest.approx(expected, abs=1e-5)
    # Images of one batch share its duration; one that came too early or too late has its own.
    assert len(set(durations)) < len(images)


def test_another_runtime_answers_the_same(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    images = [image.path.read_bytes() for image in category.test[:3]]

    async def scores(inspecting: Inspector) -> list[float]:
        found = await asyncio.gather(*(ask_for(inspecting, data) for data in images))
        return [each.report.anomaly_score for each in found]

    expected = asyncio.run(scores(inspector(backbone, prompt_set)))
    batching = Batching(runtime="openvino", threads=2)
    compiled = loaded(Inspector(limits=LIMITS.image, batching=batching), prompt_set)
    assert asyncio.run(scores(compiled)) == pytest.approx(expected, abs=1e-4)


def test_a_runtime_that_is_not_there_is_done_without_unless_it_is_named(
    prompt_set: PromptSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # imports of it raise ModuleNotFoundError
    any_runtime, named = (
        Inspector(limits=LIMITS.image, batching=batching)
        for batching in (Batching(), Batching(runtime="openvino"))
    )
    answered = asyncio.run(ask_for(loaded(any_runtime, prompt_set), png()))
    assert 0 <= answered.report.anomaly_score <= 1
    assert "PyTorch encodes images: " in caplog.text
    with pytest.raises(MissingDependencyError, match="edge"):
        loaded(named, prompt_set)


def test_a_short_burst_waits_and_a_flood_is_refused(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    small = inspector(backbone, prompt_set, Batching(max_wait_s=1))
    small._admission.expect("blister", 0.125)  # eight and the one whose turn it is
    hold = threading.Event()
    small._model.submit(hold.wait)  # nothing is done, so nothing is measured, while all arrive
    api = create_api(small, http=LIMITS, access=OPEN)

    async def rush() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:

            async def post(**headers: str) -> httpx.Response:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.post("/v1/blister/inspect", content=png(), headers=named)

            waiting = [asyncio.create_task(post()) for _ in range(20)]
            while sum(task.done() for task in waiting) < 11:
                await asyncio.sleep(0.01)
            # Whoever says for how long the answer is of use is held to that instead.
            late = await post(X_Timeout_Ms="1200")
            patient = asyncio.create_task(post(X_Timeout_Ms="19000"))
            await asyncio.sleep(0.1)
            hold.set()
            return [*await asyncio.gather(*waiting, patient), late]

    *responses, patient, late = asyncio.run(rush())
    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) == 11
    for response in (*refused, late):
        assert_problem(response, 503, "9 images are waiting")
        assert response.headers["retry-after"] == "2"
    assert patient.status_code == 200
    assert inspect(api, png()).status_code == 200


def test_several_images_of_one_form_are_answered_one_by_one(
    api: FastAPI, category: Category
) -> None:
    images = [image.path.read_bytes() for image in category.test[:2]]
    files = [("image", ("x", data, "image/png")) for data in (images[0], b"junk", images[1])]
    response = ask(api, "POST", "/v1/blister/inspect", files=files)
    first, junk, second = response.json()["inspections"]
    for answer, data in ((first, images[0]), (second, images[1])):
        alone = inspect(api, data).json()
        assert answer["anomaly_score"] == pytest.approx(alone["anomaly_score"], abs=1e-5)
        assert answer["version"] == 7
    assert (junk["status"], junk["title"]) == (400, "Not an image")
    headers = {"Accept": "image/png"}
    overlay = ask(api, "POST", "/v1/blister/inspect", files=files, headers=headers)
    assert "application/json" in assert_problem(overlay, 406, "one image")["remedy"]
    # A browser takes an image first, but anything.
    headers = {"Accept": "text/html,image/avif,image/webp,image/png,*/*;q=0.8"}
    anything = ask(api, "POST", "/v1/blister/inspect", files=files, headers=headers)
    assert len(anything.json()["inspections"]) == 3


@pytest.mark.parametrize("count", [17, 18, 19, 40])
def test_a_form_of_too_many_images_is_told_so(api: FastAPI, count: int) -> None:
    many = [("image", ("x", png(), "image/png"))] * count
    problem = assert_problem(ask(api, "POST", "/v1/blister/inspect", files=many), 413, "16 images")
    assert "max_images" in problem["remedy"]


def form(*files: bytes, end: bytes = b"--x--\r\n") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="part.png"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + end


def inspect_form(api: FastAPI, body: bytes, content_type: str = "") -> httpx.Response:
    headers = {"Content-Type": content_type or "multipart/form-data; boundary=x"}
    return inspect(api, body, headers=headers)


def test_a_form_that_lost_its_end_is_refused_wherever_it_was_cut(api: FastAPI) -> None:
    whole = form(png(), png())
    assert len(inspect_form(api, whole).json()["inspections"]) == 2
    assert inspect_form(api, whole.removesuffix(b"\r\n")).status_code == 200
    second = whole.rindex(b"--x\r\n")
    ends = (*range(second - 4, second + 70), *range(len(whole) - 40, len(whole) - 2))
    for end in ends:
        problem = assert_problem(inspect_form(api, whole[:end]), 400, "form")
        assert problem["title"] == "Bad form"
    assert_problem(inspect_form(api, form(png(), png(), end=b"")), 400, "closing boundary")


@pytest.mark.parametrize(
    ("content_type", "says"),
    [
        ("multipart/form-data", "boundary"),
        ("multipart/form-data; boundary=", "form"),
        ("multipart/form-data; boundary=other", "form"),
        (f"multipart/form-data; boundary={'x' * 5000}", "form"),
        ("multipart/form-data; boundary=x; charset=undefined", "character set"),
    ],
)
def test_a_form_that_cannot_be_read_is_the_callers_problem(
    api: FastAPI, content_type: str, says: str
) -> None:
    problem = assert_problem(inspect_form(api, form(png()), content_type), 400, says)
    assert "curl -F" in problem["remedy"]


def test_an_image_without_a_file_name_is_told_what_it_lacks(api: FastAPI) -> None:
    nameless = form(png()).replace(b'; filename="part.png"', b"")
    assert "file name" in assert_problem(inspect_form(api, nameless), 400, "no file")["remedy"]
    large = form(bytes(150_000)).replace(b'; filename="part.png"', b"")
    assert "file name" in assert_problem(inspect_form(api, large), 400, "")["remedy"]


def test_what_cannot_be_in_time_is_refused_at_once(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    api = create_api(inspector(backbone, prompt_set), http=LIMITS, access=OPEN)
    late = inspect(api, png(), headers={"X-Timeout-Ms": "1"})
    assert_problem(late, 503, "")
    assert int(late.headers["retry-after"]) >= 1
    assert_problem(inspect(api, png(), headers={"X-Timeout-Ms": "0"}), 422, "X-Timeout-Ms")
    for patient in ("20000", "9" * 400):
        assert inspect(api, png(), headers={"X-Timeout-Ms": patient}).status_code == 200
    endless = inspect(api, png(), headers={"X-Timeout-Ms": "9" * 5000})
    assert_problem(endless, 422, "X-Timeout-Ms")


def test_a_request_has_one_name_whatever_its_caller_calls_it(api: FastAPI) -> None:
    for name in (b"Stra\xdfe 7", b"", b"7" * 7000):
        answer = inspect(api, png(), headers=[(b"X-Request-ID", name)]).json()
        assert len(answer["request_id"]) == 32  # one of the fleet's own
    assert inspect(api, png(), headers={"X-Request-ID": "part-7"}).json()["request_id"] == "part-7"


def test_a_caller_that_went_away_costs_no_forward_pass(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    busy = inspector(backbone, prompt_set, Batching(max_batch_size=1, max_wait_s=60))
    forwards = []
    run = busy._batcher._run
    busy._batcher._run = lambda jobs: forwards.append(len(jobs)) or run(jobs)  # type: ignore[func-returns-value]
    api = create_api(busy, http=LIMITS, access=OPEN)

    async def rush() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            stay = asyncio.create_task(client.post("/v1/blister/inspect", content=png()))
            await asyncio.sleep(0)
            leave = [
                asyncio.create_task(_post_and_leave(api, png(), after_s=0.0)) for _ in range(5)
            ]
            await asyncio.gather(stay, *leave)

    asyncio.run(rush())
    assert len(forwards) < 6
    assert busy._admission.waiting == 0
    assert inspect(api, png()).status_code == 200


async def _post_and_leave(api: FastAPI, data: bytes, *, after_s: float) -> None:
    """A request whose connection closes as soon as its body is sent."""
    sent = False
    answered: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await asyncio.sleep(after_s)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/blister/inspect",
        "raw_path": b"/v1/blister/inspect",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png")],
        "http_version": "1.1",
        "scheme": "http",
    }
    await api(scope, receive, send)
    assert answered[0]["status"] == 499


def test_one_flooded_category_leaves_the_others_their_turn(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    batching = Batching(max_batch_size=2, threads=2, max_wait_s=1)
    shared = torch_inspector(limits=LIMITS.image, batching=batching, shared=True)
    for name in ("blister", "nut"):
        stored = StoredVersion(
            category=name, version=1, run_id="", data=prompt_set.with_category(name).to_bytes()
        )
        shared.load(name, Order(version=1), stored)
        shared._admission.expect(name, 1 / 15)
    done: list[str] = []

    async def one(name: str) -> None:
        try:
            await ask_for(shared, png(), name)
            done.append(name)
        except ProblemError as error:
            done.append(f"refused with {error.problem.status}")

    hold = threading.Event()
    shared._model.submit(hold.wait)

    async def rush() -> None:
        flood = [asyncio.create_task(one("blister")) for _ in range(20)]
        await asyncio.sleep(0.01)
        nut = asyncio.create_task(one("nut"))
        await asyncio.sleep(0.01)
        hold.set()
        await asyncio.gather(nut, *flood)

    asyncio.run(rush())
    served = [name for name in done if not name.startswith("refused")]
    assert done.count("refused with 429") == 4  # of 20, 16 may wait: 15 of them for 1 s
    assert served.index("nut") <= 6


def test_a_region_of_interest_leaves_only_what_lies_in_it(
    backbone: FrozenCLIP, prompt_set: PromptSet, category: Category
) -> None:
    data = next(image.path for image in category.test if image.is_anomalous).read_bytes()
    stored = StoredVersion(category="blister", version=1, run_id="", data=prompt_set.to_bytes())
    scores = {}
    for name, box in (("all", (0, 0, 1, 1)), ("left", (0, 0, 0.5, 1)), ("right", (0.5, 0, 0.5, 1))):
        inspecting = torch_inspector(limits=LIMITS.image)
        order = Order(
            version=1,
            decision=Decision(threshold=0.0),
            region_of_interest=RegionOfInterest(box=box),
        )
        inspecting.load("blister", order, stored)
        assert asyncio.run(inspecting.describe("blister")).counted_share == box[2]
        found = asyncio.run(ask_for(inspecting, data, picture="png"))
        assert found.picture_png is not None
        map_HW = np.asarray(Image.open(io.BytesIO(found.picture_png)))
        middle = map_HW.shape[1] // 2
        if name == "left":
            assert map_HW[:, middle + 4 :].max() == 0 < map_HW[:, :middle].max()
            assert all(region.x + region.width <= middle + 4 for region in found.report.regions)
        scores[name] = found.report.anomaly_score
    plain = asyncio.run(ask_for(inspector(backbone, prompt_set), data)).report.anomaly_score
    assert scores["all"] == pytest.approx(plain, abs=1e-6)
    assert max(scores["left"], scores["right"]) <= scores["all"] + 1e-6


def test_a_damaged_version_never_replaces_the_one_that_serves(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    serving = inspector(backbone, prompt_set)
    provenance = prompt_set.provenance.model_copy(update={"probe_score": 0.9})
    lying = dataclasses.replace(prompt_set, provenance=provenance).to_bytes()
    other = prompt_set.provenance.model_copy(update={"fingerprint": "0" * 32})
    foreign = dataclasses.replace(prompt_set, provenance=other).to_bytes()
    for data, says in (
        (lying, "not 0.9000 as when it was fitted"),
        (foreign, "another backbone"),
        (prompt_set.to_bytes()[:1000], "damaged"),
    ):
        stored = StoredVersion(category="blister", version=8, run_id="", data=data)
        with pytest.raises(AptError, match=says):
            serving.load("blister", Order(version=8), stored)
    assert asyncio.run(ask_for(serving, png())).report.version == 7


@pytest.fixture
def _no_collections() -> Iterator[None]:
    """What is let go is let go by counts of references alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def threads_of_engines() -> set[threading.Thread]:
    own = ("decode", "model", "shadow")
    return {thread for thread in threading.enumerate() if thread.name.startswith(own)}


@pytest.mark.usefixtures("_no_collections")
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_an_engine_that_nobody_holds_is_let_go_with_its_backbone_and_threads(
    prompt_set: PromptSet, runtime: Literal["torch", "openvino"]
) -> None:
    before = threads_of_engines()
    engine = Inspector(
        limits=LIMITS.image,
        batching=Batching(runtime=runtime),
        beside=Beside(None, Cache("/nonexistent", "registry")),  # type: ignore[arg-type]
    )
    asyncio.run(ask_for(loaded(engine, prompt_set), png()))
    backbone = engine._served["blister"].detector.backbone
    held = weakref.ref(engine), weakref.ref(backbone)
    del engine, backbone
    deadline = time.monotonic() + 20  # a thread lets go of its last work after it has answered
    while held[0]() or held[1]() or threads_of_engines() - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_new_version_takes_over_between_two_batches_without_a_lost_image(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    serving = inspector(backbone, prompt_set, Batching(max_batch_size=2, max_wait_s=60))
    stored = StoredVersion(category="blister", version=8, run_id="", data=prompt_set.to_bytes())

    async def swap() -> list[int]:
        asked = [asyncio.create_task(ask_for(serving, png())) for _ in range(24)]
        await asyncio.to_thread(serving.load, "blister", Order(version=8), stored)
        asked += [asyncio.create_task(ask_for(serving, png())) for _ in range(2)]
        return [found.report.version for found in await asyncio.gather(*asked)]

    versions = asyncio.run(swap())
    assert len(versions) == 26
    assert versions[-2:] == [8, 8]
    assert set(versions) <= {7, 8}
    serving.drop("blister")
    with pytest.raises(ProblemError, match="not ready"):
        asyncio.run(ask_for(serving, png()))
