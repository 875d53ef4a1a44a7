"""The root and its pools: the same answers by handle as directly, lists, operation, tokens."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from apt_ray.data.feedback import FeedbackStore
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.messages import CategoryReport, Inspected, InspectionRequest
from serving.api.pools import Answering, Pools, Refusal
from serving.api.problems import ProblemError
from serving.api.root import create_root_api
from serving.api.tuning import Tuning
from serving.controller.cache import Cache
from serving.controller.orders import CategoryStatus, FleetStatus, Order, Routes, StoredVersion
from serving.replica.inspector import Inspector
from serving.settings import Auth, HttpLimits
from tests.serving.engines import torch_inspector

LIMITS = HttpLimits(max_bytes=200_000, max_pixels=100_000, timeout_s=20)
SECRET = "the webhook's secret"


def token(name: str, *scopes: str) -> dict[str, object]:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "sha256": digest, "scopes": scopes}


class KnownController:
    """A controller that knows two categories."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.states = {"blister": "READY", "washer": "LOADING"}
        self.away = False
        self.polled_s_ago = 1.0

    async def routes(self, known: str) -> Routes:
        raise NotImplementedError

    async def shadow(self, category: str) -> None:
        """No candidate is tried."""

    async def status(self) -> FleetStatus:
        if self.away:
            raise RayServeException("the controller has ended")
        return FleetStatus(
            revision=3,
            deployed_by="me@here",
            registry="ok",
            polled_s_ago=self.polled_s_ago,
            categories={
                name: CategoryStatus(
                    state=state,  # type: ignore[arg-type]
                    pools=("tail",),
                    wanted=1,
                    serving=(1,) if state == "READY" else (),
                    replicas=1,
                    from_cache=False,
                )
                for name, state in self.states.items()
            },
        )

    async def audit_lines(self) -> list[dict[str, object]]:
        return [{"operation": "deploy"}]

    async def wake(self, reason: str) -> None:
        self.woken.append(reason)


@pytest.fixture(scope="module")
def tail(prompt_set: PromptSet) -> Inspector:
    """The engine of a pool that serves one category."""
    inspector = torch_inspector(limits=LIMITS.image, shared=True)
    stored = StoredVersion(category="blister", version=7, run_id="r", data=prompt_set.to_bytes())
    inspector.load("blister", Order(version=7), stored)
    return inspector


def root_of(
    service: Any,
    controller: KnownController | None = None,
    auth: Auth | None = None,
    http: HttpLimits = LIMITS,
    tuning: Tuning | None = None,
    feedback: FeedbackStore | None = None,
) -> FastAPI:
    access = Access(Auth())
    pools = Pools(lambda pool: service, access)
    routes = {"blister": ("tail",), "washer": ("tail", "washer")}
    pools.follow(Routes(pools=routes, auth=auth or Auth()))
    return create_root_api(
        pools,
        controller or KnownController(),
        http=http,
        access=access,
        webhook_secret=SECRET,
        tuning=tuning,
        feedback=feedback,
    )


def ask(api: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_a_shared_pool_answers_by_handle_what_it_answers_directly(
    tail: Inspector, category: Category
) -> None:
    direct = create_api(tail, http=LIMITS, access=Access(Auth()))
    handed = root_of(Answering(tail))
    picture = category.test[0].path.read_bytes()
    several = [("image", ("x", data, "image/png")) for data in (picture, b"junk")]
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/blister/inspect", {"content": picture}),
        ("POST", "/v1/blister/inspect?map=png", {"content": picture}),
        ("POST", "/v1/blister/inspect?map=overlay", {"content": picture}),
        ("POST", "/v1/blister/inspect", {"content": picture, "headers": {"Accept": "image/png"}}),
        ("POST", "/v1/blister/inspect", {"files": several}),
        ("POST", "/v1/blister/inspect", {"content": b"junk"}),
        ("POST", "/v1/blister/inspect", {"content": picture[:-50]}),
        ("POST", "/v1/blister/inspect", {"content": bytes(300_000)}),
        ("POST", "/v1/blister/inspect?map=tiff", {"content": picture}),
        ("POST", "/v1/blister/inspect?alias=candidate", {"content": picture}),
        ("POST", "/v1/blister/inspect?alias=7", {"content": picture}),
        ("POST", "/v1/blister/inspect", {"json": {}}),
        ("GET", "/v1/blister", {}),
    ]
    for method, path, request in requests:
        headers = {"X-Request-Id": "same", **request.pop("headers", {})}
        one, other = (
            ask(api, method, path, headers=headers, **request) for api in (direct, handed)
        )
        assert one.status_code == other.status_code
        assert one.headers == other.headers or "json" in one.headers["content-type"]
        if one.headers["content-type"].startswith("image"):
            assert one.content == other.content
        else:
            assert without_timings(one.json()) == without_timings(other.json())


def without_timings(answer: dict[str, Any]) -> dict[str, Any]:
    if "inspections" in answer:
        return {"inspections": [without_timings(each) for each in answer["inspections"]]}
    return {name: value for name, value in answer.items() if name != "timings_ms"}


def test_a_pool_in_trouble_is_explained(tail: Inspector) -> None:
    class Failing:
        def __init__(self, *errors: Exception) -> None:
            self.errors = list(errors)

        async def inspect(
            self, category: str, data: bytes, asked: InspectionRequest
        ) -> Inspected | Refusal:
            if self.errors:
                raise self.errors.pop(0)
            return await Answering(tail).inspect("blister", data, asked)

        async def describe(self, category: str) -> CategoryReport | Refusal:
            raise RayServeException("the application is gone")

    picture = b"BM"
    died = RayActorError()
    # A replica that dies is asked again; the second answer is about the image.
    assert (
        ask(root_of(Failing(died)), "POST", "/v1/blister/inspect", content=picture).status_code
        == 400
    )
    for errors in ((died, died), (RayServeException("gone"),)):
        answer = ask(root_of(Failing(*errors)), "POST", "/v1/blister/inspect", content=picture)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
    assert ask(root_of(Failing()), "GET", "/v1/blister").status_code == 503


def test_the_root_starts_without_the_controller_from_its_cache(tmp_path: Path) -> None:
    class Routing(KnownController):
        async def routes(self, known: str) -> Routes:
            if self.away:
                raise RayServeException("the controller has ended")
            return Routes(pools={"nut": ("tail",)}, auth=AUTH)

    def pools(folder: Path) -> tuple[Pools, Access]:
        access = Access(Auth())
        return Pools(lambda pool: Answering(None), access, Cache(str(folder), "r")), access  # type: ignore[arg-type]

    controller = Routing()
    first, _ = pools(tmp_path)
    asyncio.run(first.start(controller, patience_s=5))
    controller.away = True
    second, access = pools(tmp_path)
    asyncio.run(second.start(controller, patience_s=60))
    assert second.categories == ["nut"]
    with pytest.raises(ProblemError, match="no token"):
        access.check(None, "inspect")
    third, _ = pools(tmp_path / "nothing")
    with pytest.raises(FleetError, match="controller does not answer"):
        asyncio.run(third.start(controller, patience_s=0.1))


def test_the_root_lists_and_explains(tail: Inspector) -> None:
    controller = KnownController()
    root = root_of(Answering(tail), controller)
    unknown = ask(root, "POST", "/v1/screw/inspect", content=b"BM")
    assert unknown.status_code == 404
    assert "blister, washer" in unknown.json()["remedy"]
    early = ask(root, "POST", "/v1/washer/inspect", content=b"BM")
    assert (early.status_code, "washer" in early.json()["detail"]) == (503, True)
    assert ask(root, "GET", "/readyz").status_code == 503
    assert ask(root, "GET", "/v1").json()["categories"] == [
        {"category": "blister", "inspect": "/v1/blister/inspect", "status": "READY"},
        {"category": "washer", "inspect": "/v1/washer/inspect", "status": "LOADING"},
    ]
    controller.states["washer"] = "READY"
    assert ask(root, "GET", "/readyz").json() == {"status": "ok"}
    assert ask(root, "GET", "/fleet/status").json()["revision"] == 3
    assert ask(root, "GET", "/fleet/audit").json()["lines"] == [{"operation": "deploy"}]
    assert ask(root, "POST", "/fleet/refresh").json() == {"status": "ok"}
    assert controller.woken == ["refresh"]
    controller.away = True
    for path in ("/v1", "/readyz", "/fleet/status"):
        answer = ask(root, "GET", path)
        assert (answer.status_code, "controller" in answer.json()["detail"]) == (503, True)
    assert ask(root, "GET", "/healthz").status_code == 200


def test_whoever_polls_gets_nothing_while_nothing_changes(tail: Inspector) -> None:
    controller = KnownController()
    root = root_of(Answering(tail), controller)
    for path in ("/v1", "/fleet/status"):
        controller.states["washer"] = "LOADING"
        first = ask(root, "GET", path)
        known = {"If-None-Match": first.headers["etag"]}
        controller.polled_s_ago += 1  # as it does all the time
        for method in ("GET", "HEAD"):
            same = ask(root, method, path, headers=known)
            assert (same.status_code, same.content) == (304, b"")
            assert same.headers["etag"] == first.headers["etag"]
        controller.states["washer"] = "READY"
        second = ask(root, "GET", path, headers=known)
        assert (second.status_code, second.headers["etag"] != first.headers["etag"]) == (200, True)
        assert second.json() != first.json()
    guarded = root_of(Answering(tail), controller, AUTH)
    assert ask(guarded, "GET", "/fleet/status", headers=known).status_code == 401


def test_the_description_names_the_routes_and_the_pages_load_nothing_from_elsewhere(
    tail: Inspector,
) -> None:
    root = root_of(Answering(tail))
    description = ask(root, "GET", "/openapi.json")
    paths = description.json()["paths"]
    # Whoever makes a client of it has no more of regular expressions than this.
    for pattern in re.findall(r'"pattern":("(?:[^"\\]|\\.)*")', description.text):
        re.compile(json.loads(pattern))
    operation = paths["/v1/{category}/inspect"]["post"]
    assert {"image/png", "multipart/form-data"} <= set(operation["requestBody"]["content"])
    statuses = {"200", "400", "401", "403", "404", "408", "413", "415", "422", "429", "503"}
    assert statuses <= set(operation["responses"])
    assert {"/v1", "/v1/{category}", "/healthz", "/readyz", "/fleet/status"} <= set(paths)
    for path in ("/", "/docs"):
        page = ask(root, "GET", path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'; connect-src 'self'" in policy
        assert "unsafe" not in policy
        links = [part.split('"')[0] for part in page.text.split('src="')[1:]]
        links += [part.split('"')[0] for part in page.text.split('href="')[1:]]
        assert links
        for link in links:
            assert ask(root, "GET", urljoin(path, link)).status_code == 200, link


def test_the_fleet_works_behind_a_path_prefix(tail: Inspector) -> None:
    root = root_of(Answering(tail), http=LIMITS.model_copy(update={"root_path": "/fleet/west"}))

    def through_the_web_server(method: str, path: str) -> httpx.Response:
        assert path.startswith("/fleet/west/"), path
        return ask(root, method, path.removeprefix("/fleet/west"))

    for page in ("/fleet/west/", "/fleet/west/docs"):
        text = through_the_web_server("GET", page).text
        links = [part.split('"')[0] for part in text.split('src="')[1:]]
        links += [part.split('"')[0] for part in text.split('href="')[1:]]
        assert links
        for link in links:
            found = through_the_web_server("GET", urljoin(page, link))
            assert found.status_code == 200, link
            # Scripts ask from where their page is, not from where the host begins.
            if link.endswith(".js"):
                assert not re.search(r"(fetch|ask)\([\"'`]/", found.text)
    assert ask(root, "GET", "/openapi.json").json()["servers"] == [{"url": "/fleet/west"}]
    first = ask(root, "GET", "/v1").json()["categories"][0]["inspect"]
    assert first == "/fleet/west/v1/blister/inspect"
    assert through_the_web_server("POST", first).status_code == 400  # no image, but the category
    moved = ask(root, "POST", "/v1/blister/inspect/", content=b"BM")
    assert urlsplit(moved.headers["location"]).path == first


def test_the_console_has_its_addresses_and_takes_none_of_the_apis(tail: Inspector) -> None:
    prefixed = root_of(Answering(tail), http=LIMITS.model_copy(update={"root_path": "/fleet"}))
    for root, base in ((root_of(Answering(tail)), ""), (prefixed, "/fleet")):
        front = ask(root, "GET", "/")
        assert f'src="{base}/console/app.js"' in front.text
        tabs = ("", "/inspect", "/history", "/versions", "/tune")
        for path in ("/searches", *(f"/c/blister{tab}" for tab in tabs)):
            page = ask(root, "GET", path)
            assert page.text == front.text, path
            assert page.headers["content-security-policy"]
    for path in ("/c", "/c/blister/nothing", "/v2", "/fleet/nothing", "/console/nothing.js"):
        assert ask(root, "GET", path).status_code == 404, path
        assert ask(root, "GET", path).headers["content-type"] == "application/problem+json"
    assert ask(root, "POST", "/c/blister").status_code == 405


def test_every_address_that_answers_get_answers_head(tail: Inspector) -> None:
    root = root_of(Answering(tail))
    paths = (
        "/",
        "/docs",
        "/healthz",
        "/v1",
        "/v1/blister",
        "/openapi.json",
        "/fleet/status",
        "/fleet/me",
        "/c/blister",
        "/searches",
    )
    for path in (*paths, "/c/blister/history", "/console/app.js"):
        assert ask(root, "HEAD", path).status_code == 200, path
    assert ask(root, "HEAD", "/readyz").status_code == 503
    assert ask(root, "HEAD", "/v1/blister/inspect").status_code == 405


def test_pages_of_the_named_origins_may_ask_and_no_others(tail: Inspector) -> None:
    http = LIMITS.model_copy(update={"allow_origins": ("https://mes.example",)})
    pool = create_api(tail, http=http, access=Access(AUTH))
    for api in (pool, root_of(Answering(tail), auth=AUTH, http=http)):
        preflight = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, x-timeout-ms",
        }
        for origin, status in (("https://mes.example", 200), ("https://else.example", 400)):
            asked = {"Origin": origin, **preflight}
            allowed = ask(api, "OPTIONS", "/v1/blister/inspect", headers=asked)
            assert allowed.status_code == status
            # What is refused is told to the page as well.
            answer = ask(api, "POST", "/v1/blister/inspect", headers={"Origin": origin})
            assert answer.status_code == 401
            for each in (allowed, answer):
                shown = each.headers.get("access-control-allow-origin")
                assert shown == (origin if status == 200 else None)
    closed = ask(root_of(Answering(tail)), "GET", "/v1", headers={"Origin": "https://mes.example"})
    assert not [name for name in closed.headers if name.startswith("access-control")]


AUTH = Auth.parse(
    {
        "tokens": [
            token("all", "inspect"),
            token("one", "inspect:blister"),
            token("other", "inspect:washer"),
            token("boss", "operate"),
        ]
    }
)


@pytest.mark.parametrize(
    ("header", "inspects", "lists", "operates"),
    [
        (None, 401, 401, 401),
        ("Bearer wrong", 401, 401, 401),
        ("Basic all", 401, 401, 401),
        ("Bearer all", 400, 200, 403),
        ("Bearer one", 400, 200, 403),
        ("Bearer other", 403, 200, 403),
        ("Bearer boss", 403, 200, 200),
    ],
)
def test_a_token_is_good_for_its_scopes_alone(
    tail: Inspector, header: str | None, inspects: int, lists: int, operates: int
) -> None:
    headers = {"Authorization": header} if header else {}
    root = root_of(Answering(tail), auth=AUTH)
    for expected, method, path in (
        (inspects, "POST", "/v1/blister/inspect"),
        (lists, "GET", "/v1"),
        (operates, "GET", "/fleet/status"),
        (operates, "POST", "/fleet/refresh"),
    ):
        answer = ask(root, method, path, headers=headers)
        assert answer.status_code == expected, path
        if expected == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert "token" in answer.json()["detail"]
    for open_to_all in ("/", "/docs", "/openapi.json", "/healthz"):
        assert ask(root, "GET", open_to_all).status_code == 200


def test_a_caller_is_told_who_it_is(tail: Inspector) -> None:
    guarded = root_of(Answering(tail), auth=AUTH)
    one = ask(guarded, "GET", "/fleet/me", headers={"Authorization": "Bearer one"})
    assert one.json() == {"name": "one", "scopes": ["inspect:blister"], "needs_token": True}
    assert ask(guarded, "GET", "/fleet/me").status_code == 401
    anybody = ask(root_of(Answering(tail)), "GET", "/fleet/me").json()
    assert anybody == {
        "name": "",
        "scopes": ["inspect", "feedback", "operate"],
        "needs_token": False,
    }


def test_tokens_change_while_the_fleet_runs(tail: Inspector) -> None:
    access = Access(AUTH)
    api = create_api(tail, http=LIMITS, access=access)
    headers = {"Authorization": "Bearer new"}
    assert ask(api, "GET", "/v1/blister", headers=headers).status_code == 401
    access.allow(Auth.parse({"tokens": [token("new", "inspect")]}))
    assert ask(api, "GET", "/v1/blister", headers=headers).status_code == 200
    headers = {"Authorization": "Bearer all"}
    assert ask(api, "GET", "/v1/blister", headers=headers).status_code == 401


def test_only_a_signed_and_fresh_webhook_wakes_the_controller(tail: Inspector) -> None:
    controller = KnownController()
    root = root_of(Answering(tail), controller)
    body = json.dumps({"entity": "model_version_alias"}).encode()

    def deliver(
        secret: str = SECRET, age_s: int = 0, stamp: str = "", **changed: str
    ) -> httpx.Response:
        stamp = stamp or str(int(time.time()) - age_s)
        signed = hmac.new(secret.encode(), f"id.{stamp}.".encode() + body, hashlib.sha256)
        headers = {
            "X-MLflow-Delivery-Id": "id",
            "X-MLflow-Timestamp": stamp,
            "X-MLflow-Signature": "v1," + base64.b64encode(signed.digest()).decode(),
        } | changed
        return ask(root, "POST", "/webhooks/mlflow", content=body, headers=headers)

    assert deliver().status_code == 200
    assert controller.woken == ["webhook id"]
    for refused in (
        deliver(secret="another"),
        deliver(age_s=3600),
        deliver(stamp="soon"),
        deliver(stamp="9" * 400),
        deliver(stamp="9" * 5000),
        deliver(**{"X-MLflow-Delivery-Id": "other"}),
        ask(root, "POST", "/webhooks/mlflow", content=body),
    ):
        assert refused.status_code == 403
        assert refused.json()["remedy"]
    assert controller.woken == ["webhook id"]
