"""Which version serves, decided over HTTP: asked, carried out in the registry, looked at, kept."""

import asyncio
import io
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from PIL import Image

from apt_ray.errors import FleetError
from apt_ray.registry import CANDIDATE, CHAMPION
from serving.api.access import Access
from serving.api.moves import add_moves
from serving.api.problems import install
from serving.api.version_pictures import add_version_pictures
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.moves import MoveOrder, MoveResult
from serving.controller.orders import Plan
from serving.settings import Auth, FeedbackSettings
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set
from tests.serving.test_root import AUTH

WHY = {"reason": "the new lamp"}
BOSS = {"Authorization": "Bearer boss"}


class Desk:
    """An operator with curl, in front of a controller and a registry in memory."""

    def __init__(
        self,
        registry: FakeRegistry,
        folder: Path,
        *,
        promoting: Callable[[MoveOrder], Awaitable[MoveResult]] | None = None,
        auth: Auth = AUTH,
        feedback: FeedbackSettings | None = None,
    ) -> None:
        self.controller = Controller(
            lambda: registry,
            Cache(str(folder), "registry"),
            poll_s=60,
            page="https://mlflow.example/",
            promoting=promoting,
            feedback=feedback,
        )
        self.api = FastAPI()
        install(self.api)
        add_moves(self.api, self.controller, Access(auth))
        add_version_pictures(self.api, self.controller, Access(auth))

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.request(method, path, headers=BOSS, **request)

    async def begin(self, category: str, kind: str, **body: Any) -> httpx.Response:
        return await self.ask("POST", f"/fleet/categories/{category}/{kind}", json=WHY | body)

    async def end(self, begun: httpx.Response) -> dict[str, Any]:
        assert begun.status_code == 202, begun.text
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            operation: dict[str, Any] = (await self.ask("GET", begun.headers["location"])).json()
            if operation["state"] != "running":
                return operation
            await asyncio.sleep(0.02)
        raise AssertionError(operation)

    async def move(self, category: str, kind: str, **body: Any) -> dict[str, Any]:
        return await self.end(await self.begin(category, kind, **body))


def stocked(registry: FakeRegistry | None = None, *, versions: int) -> FakeRegistry:
    registry = registry or FakeRegistry()
    for seed in range(versions):
        registry.register(make_prompt_set("nut", seed=seed), pictures={}, trials=[])
    return registry


def test_the_first_candidate_of_a_new_category_is_promoted_without_a_comparison(
    tmp_path: Path,
) -> None:
    registry = FakeRegistry()
    tags = {"ray.submission_id": "search-nut-1"}
    registry.register(make_prompt_set("nut"), pictures={}, trials=[], tags=tags, promote=False)
    desk = Desk(registry, tmp_path)

    async def run() -> None:
        listed = (await desk.ask("GET", "/fleet/categories/nut/versions")).json()["versions"]
        assert [(each["aliases"], each["search"]) for each in listed] == [
            ([CANDIDATE], "search-nut-1")
        ]
        promoted = await desk.move("nut", "promote")
        assert (promoted["result"]["moved"], promoted["result"]["why"]) == (
            True,
            "there was no champion",
        )
        assert registry.champions() == {"nut": 1}

    asyncio.run(run())


def test_what_was_drawn_of_a_version_is_shown(tmp_path: Path) -> None:
    registry = stocked(versions=1)
    drawn = {"trials": Image.new("RGB", (8, 6)), "perturbations": Image.new("RGB", (4, 3))}
    registry.register(make_prompt_set("nut", seed=1), pictures=drawn, trials=[])
    desk = Desk(registry, tmp_path)
    place = "/fleet/categories/nut/versions"

    async def run() -> None:
        found = await desk.ask("GET", f"{place}/2/pictures")
        assert found.json() == {"pictures": ["perturbations", "trials"]}
        picture = await desk.ask("GET", f"{place}/2/pictures/trials")
        assert picture.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(picture.content)) as image:
            assert image.size == (8, 6)
        assert (await desk.ask("GET", f"{place}/1/pictures")).json() == {"pictures": []}
        for path, title in (
            (f"{place}/3/pictures", "Unknown version"),
            (f"{place}/3/pictures/trials", "Unknown picture"),
            (f"{place}/2/pictures/..%2Fprompt_set", "Not Found"),
            (f"{place}/2/pictures/others", "Unknown picture"),
            ("/fleet/categories/screw/versions/1/pictures", "Unknown version"),
        ):
            absent = await desk.ask("GET", path)
            assert (absent.status_code, absent.json()["title"]) == (404, title), path
            assert absent.json()["remedy"]
        assert (await desk.ask("GET", f"{place}/0/pictures")).status_code == 422
        registry.is_away = True
        assert (await desk.ask("GET", f"{place}/2/pictures")).status_code == 200  # kept
        assert (await desk.ask("GET", f"{place}/3/pictures")).status_code == 503

    asyncio.run(run())


def test_a_candidate_is_promoted_by_force_rolled_back_and_discarded(tmp_path: Path) -> None:
    registry = stocked(versions=2)
    desk = Desk(registry, tmp_path)

    async def run() -> None:
        await desk.controller.plan(Plan.parse({"revision": 1, "pools": {"tail": {"nut": {}}}}))
        kept = await desk.move("nut", "promote")
        assert (kept["state"], kept["error"], kept["by"]) == ("done", None, "boss")
        assert kept["result"]["moved"] is False
        assert kept["result"]["verdict"] == "uncomparable"
        assert "### Promotion: version 2 of nut" in kept["result"]["report"]
        assert registry.champions() == {"nut": 1}

        forced = await desk.move("nut", "promote", force=True)
        assert (forced["result"]["moved"], forced["result"]["version"]) == (True, 2)
        assert registry.champions() == {"nut": 2}
        why = registry.history("nut").moves[-1].why
        assert why.startswith("forced: the new lamp (boss, through the fleet)")

        back = await desk.move("nut", "roll-back", reason="rejects good parts")
        assert (back["result"]["version"], registry.champions()) == (1, {"nut": 1})
        assert registry.history("nut").moves[-1].why == (
            "rejects good parts (boss, through the fleet)"
        )

        gone = await desk.move("nut", "discard", reason="blurred images")
        assert gone["result"]["version"] == 2
        assert registry.aliases() == {"nut": {CHAMPION: 1}}
        again = await desk.move("nut", "discard")
        assert (again["state"], again["result"]) == ("failed", None)
        assert "no version or alias 'candidate'" in again["error"]

        lines = [line for line in await desk.controller.audit_lines() if "operation_id" in line]
        assert [line["operation"] for line in lines[:2]] == ["promote", "promote"]
        assert {line["by"] for line in lines} == {"boss"}
        assert {line["state"] for line in lines} == {"running", "done", "failed"}
        assert lines[-3]["reason"] == "blurred images"

    asyncio.run(run())


class WithPages(FakeRegistry):
    def page(self, category: str, version: int) -> str:
        return f"#/{category}/{version}"


def test_the_versions_say_who_let_them_serve_and_why(tmp_path: Path) -> None:
    registry = stocked(WithPages(), versions=3)
    desk = Desk(registry, tmp_path)

    judged = {"difference": "+0.0400 ± 0.0100", "judged_on": "8 images against version 1"}
    registry.annotate(registry.resolve("nut", "3"), judged, report="", name="")

    async def run() -> None:
        await desk.move("nut", "promote", force=True)
        registry.register(make_prompt_set("nut", seed=3), pictures={}, trials=[])
        await desk.move("nut", "discard", reason="blurred images")
        listed = (await desk.ask("GET", "/fleet/categories/nut/versions")).json()["versions"]
        assert [each["version"] for each in listed] == [4, 3, 2, 1]
        fourth, third, second, first = listed
        assert (third["aliases"], first["aliases"], fourth["aliases"]) == ([CHAMPION], [], [])
        assert third["verdict"] == "uncomparable"
        assert {name: third[name] for name in judged} == judged
        assert third["reason"].startswith("forced: the new lamp (boss")
        assert third["served_since"] > "2025"
        assert third["created"] > "2025"
        assert (second["by"], second["served_since"], second["verdict"]) == ("", "", "")
        assert fourth["discarded"] == "blurred images (boss, through the fleet)"
        assert second["settings"] == {"seed": "1"}
        assert (second["shots"], second["validation"]) == (4, 0.9125)
        assert second["link"] == "https://mlflow.example/#/nut/2"
        two = await desk.ask("GET", "/fleet/categories/nut/versions?limit=2")
        assert len(two.json()["versions"]) == 2
        unknown = await desk.ask("GET", "/fleet/categories/screw/versions")
        assert (unknown.status_code, unknown.json()["title"]) == (404, "Unknown category")
        registry.is_away = True
        away = await desk.ask("GET", "/fleet/categories/nut/versions")
        assert (away.status_code, away.json()["title"]) == (503, "Registry unavailable")
        failed = await desk.move("nut", "roll-back")
        assert (failed["state"], "no registry answers" in failed["error"]) == ("failed", True)

    asyncio.run(run())


def test_a_category_is_moved_by_one_at_a_time_and_others_meanwhile(tmp_path: Path) -> None:
    registry = stocked(versions=2)
    registry.register(make_prompt_set("bolt"), pictures={}, trials=[])
    compared = asyncio.Event()

    async def promoting(order: MoveOrder) -> MoveResult:
        await compared.wait()
        raise FleetError("the comparison did not end: see whether a node has 0.25 CPU free")

    async def run() -> None:
        desk = Desk(registry, tmp_path, promoting=promoting)
        begun = await desk.begin("nut", "promote")
        assert begun.json()["state"] == "running"
        second = await desk.begin("nut", "roll-back")
        assert (second.status_code, begun.json()["id"] in second.json()["detail"]) == (409, True)
        assert "nothing to roll back to" in (await desk.move("bolt", "roll-back"))["error"]
        compared.set()
        ended = await desk.end(begun)
        assert (ended["state"], ended["result"]) == ("failed", None)
        assert ended["error"].startswith("the comparison did not end")
        assert registry.aliases()["nut"] == {CHAMPION: 1, CANDIDATE: 2}

    asyncio.run(run())


def test_a_move_needs_a_reason_and_an_operation_an_id(tmp_path: Path) -> None:
    desk = Desk(stocked(versions=1), tmp_path)

    async def run() -> None:
        for reason in ("", "  x  ", "x" * 501, "two\nlines", None):
            refused = await desk.begin("nut", "roll-back", reason=reason)
            assert (refused.status_code, "reason" in refused.json()["detail"]) == (422, True)
        assert (await desk.begin("n%20t", "promote")).status_code == 422
        assert (await desk.begin("nut", "polish")).status_code == 404
        unknown = await desk.ask("GET", "/fleet/operations/none")
        assert (unknown.status_code, unknown.json()["title"]) == (404, "Unknown operation")
        for path in ("categories/nut/versions", "operations/none"):
            transport = httpx.ASGITransport(desk.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
                other = {"Authorization": "Bearer all"}
                assert (await client.get(f"/fleet/{path}", headers=other)).status_code == 403

    asyncio.run(run())
