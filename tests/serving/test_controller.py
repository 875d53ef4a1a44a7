"""The controller and those who follow it, without a cluster: news, outages, caches, two at once."""

import asyncio
import dataclasses
import threading
from pathlib import Path

import pytest

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError, RegistryError
from serving.api.access import Access
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.orders import Order, Orders, Plan, ReplicaReport, StoredVersion
from serving.replica.follower import Follower
from serving.replica.inspector import Inspector
from serving.settings import Auth, Batching, HttpLimits

_TASKS: list[asyncio.Task[None]] = []
PLAN = Plan.parse({"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {"version": 4}}}})


class Shelf:
    """A registry in memory."""

    def __init__(self, prompt_set: PromptSet | None = None) -> None:
        self.found = {"nut": {"champion": 1}, "bolt": {"champion": 1}}
        self.prompt_set = prompt_set
        self.away = False
        self.asked = 0
        self.lock = threading.Lock()

    def aliases(self) -> dict[str, dict[str, int]]:
        with self.lock:
            self.asked += 1
        if self.away:
            raise RegistryError("no MLflow server answers")
        return {name: dict(aliases) for name, aliases in self.found.items()}

    def fetch(self, category: str, version: int) -> StoredVersion:
        if self.away:
            raise RegistryError("no MLflow server answers")
        assert self.prompt_set is not None
        data = self.prompt_set.with_category(category).to_bytes()
        return StoredVersion(category=category, version=version, run_id="run", data=data)


async def started(
    shelf: Shelf, folder: Path, *, poll_s: float = 60, plan: Plan = PLAN
) -> Controller:
    controller = Controller(shelf, Cache(str(folder), "registry"), poll_s=60)
    await controller.plan(plan)
    _TASKS.append(asyncio.create_task(controller.poll_forever()))  # or it would be collected
    return controller


def test_a_move_of_an_alias_reaches_those_who_wait(tmp_path: Path) -> None:
    shelf = Shelf()

    async def run() -> None:
        controller = await started(shelf, tmp_path)
        first = await controller.follow("tail", "r", ReplicaReport())
        versions = {name: order.version for name, order in first.categories.items()}
        assert versions == {"nut": 1, "bolt": 4}
        waiting = asyncio.create_task(
            controller.follow("tail", "r", ReplicaReport(orders=first.etag), wait_s=20)
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        shelf.found["nut"]["champion"] = 2
        await controller.wake("webhook")
        second = await asyncio.wait_for(waiting, 5)
        assert second.categories["nut"].version == 2
        operations = [line["operation"] for line in await controller.audit_lines()]
        assert operations.count("alias moved") == 2  # the first news, and the move
        assert "wake" in operations

    asyncio.run(run())


def test_without_the_registry_the_last_news_holds(tmp_path: Path) -> None:
    shelf = Shelf()

    async def run() -> None:
        first = await started(shelf, tmp_path)
        assert (await first.follow("tail", "r", ReplicaReport())).categories["nut"].version == 1
        shelf.away = True
        second = await started(shelf, tmp_path)  # as after a restart
        orders = await second.follow("tail", "r", ReplicaReport())
        assert orders.categories["nut"].version == 1
        assert "no MLflow server" in (await second.status()).registry
        third = await started(shelf, tmp_path / "elsewhere")
        orders = await third.follow("tail", "r", ReplicaReport())
        assert orders.categories["nut"].version is None  # keep what you have

    asyncio.run(run())


def test_the_status_says_what_is_not_as_it_should_be(tmp_path: Path) -> None:
    shelf = Shelf()

    async def state(controller: Controller, **categories: object) -> tuple[str, str | None]:
        report = ReplicaReport.parse({"orders": "x", "categories": categories})
        await controller.follow("tail", "r", report, wait_s=0)
        status = (await controller.status()).categories["nut"]
        return status.state, status.problem

    async def run() -> None:
        controller = await started(shelf, tmp_path)
        await controller.poll()
        assert (await controller.status()).categories["nut"].state == "IDLE"
        assert await state(controller) == ("LOADING", None)
        assert await state(controller, nut={"version": 1}) == ("READY", None)
        problem = {"version": 1, "problem": "damaged"}
        assert await state(controller, nut=problem) == ("FAILED", "damaged")
        del shelf.found["nut"]
        await controller.poll()
        assert (await state(controller, nut={"version": 1}))[0] == "FAILED"
        away = await started(shelf, tmp_path, plan=Plan(revision=2))
        assert (await away.status()).categories == {}

    asyncio.run(run())


class Line:
    """A controller at the end of a line that can be cut."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.cut = False

    async def follow(
        self, pool: str, replica: str, report: ReplicaReport, *, wait_s: float
    ) -> Orders:
        if self.cut:
            raise ConnectionError("the line is cut")
        return await self.controller.follow(pool, replica, report, wait_s=wait_s)

    async def fetch(self, category: str, version: int) -> StoredVersion:
        if self.cut:
            raise ConnectionError("the line is cut")
        return await self.controller.fetch(category, version)


def replica(line: Line, folder: Path) -> tuple[Follower, Inspector, Access]:
    inspector = Inspector(limits=HttpLimits().image, batching=Batching(), shared=True)
    access = Access(Auth())
    follower = Follower(
        "tail",
        "r",
        line,
        cache=Cache(str(folder), "registry"),
        inspector=inspector,
        access=access,
        wait_s=1,
        again_s=0.2,
    )
    return follower, inspector, access


def test_a_replica_follows_and_starts_from_its_cache(tmp_path: Path, prompt_set: PromptSet) -> None:
    shelf = Shelf(prompt_set)

    async def run() -> None:
        controller = await started(shelf, tmp_path / "controller")
        line = Line(controller)
        follower, inspector, _ = replica(line, tmp_path / "replica")
        await follower.start(patience_s=20)
        assert {name: order.version for name, order in inspector.serves().items()} == {
            "nut": 1,
            "bolt": 4,
        }
        following = asyncio.create_task(follower.follow_forever())
        shelf.found["nut"]["champion"] = 2
        await controller.wake("test")
        while inspector.serves()["nut"].version != 2:
            await asyncio.sleep(0.05)
        # Told to serve it no more, a replica still does for the few who have not heard.
        await controller.plan(Plan.parse({"revision": 2, "pools": {"tail": {"nut": {}}}}))
        while follower.report.categories.keys() != {"nut"}:
            await asyncio.sleep(0.05)
        assert "bolt" in inspector.serves()
        following.cancel()

        line.cut = True
        again, alone, _ = replica(line, tmp_path / "replica")
        await again.start(patience_s=0.2)
        assert alone.serves() == {"nut": Order(version=2)}
        assert again.report.categories["nut"].source == "cache"
        assert not again.report.followed
        following = asyncio.create_task(again.follow_forever())
        line.cut = False
        while not again.report.followed:
            await asyncio.sleep(0.05)
        assert again.report.categories["nut"].source == "registry"
        following.cancel()

        line.cut = True
        nobody, _, _ = replica(line, tmp_path / "nothing")
        with pytest.raises(FleetError, match="controller does not answer"):
            await nobody.start(patience_s=0.2)

    asyncio.run(run())


def test_one_bad_category_leaves_the_rest_of_its_pool_alone(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    shelf = Shelf(prompt_set)
    plan = Plan.parse(
        {"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {"false_alarm_rate": 0.01}}}}
    )

    async def run() -> None:
        controller = await started(shelf, tmp_path / "controller", plan=plan)
        follower, inspector, _ = replica(Line(controller), tmp_path / "replica")
        await follower.start(patience_s=20)
        assert list(inspector.serves()) == ["nut"]
        problem = follower.report.categories["bolt"].problem
        assert problem
        assert "no calibration images, 99 are needed" in problem

    asyncio.run(run())


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), "registry")
    assert cache.get("nut", 1) is None
    assert cache.recall("orders", Orders) is None
    stored = StoredVersion(category="nut", version=1, run_id="r", data=b"x")
    cache.put(stored)
    assert cache.get("nut", 1) == stored
    assert Cache(str(tmp_path), "another").get("nut", 1) is None
    cache.remember("orders", Orders(categories={"nut": Order(version=1)}))
    (file,) = tmp_path.glob("*/orders.json")
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("{")
    assert cache.recall("orders", Orders) is None
    for version in range(2, 9):
        cache.put(dataclasses.replace(stored, version=version))
    assert cache.get("nut", 8) is not None
    assert len(list(tmp_path.glob("*/nut/*"))) == 3
    # A folder that cannot be written is no error.
    for folder in ("/proc/nowhere", str(file)):
        Cache(folder, "registry").put(stored)
        Cache(folder, "registry").remember("orders", Orders())
