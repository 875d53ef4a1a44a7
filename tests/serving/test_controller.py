"""The controller and those who follow it, without a cluster: news, outages, caches, two at once."""

import asyncio
import dataclasses
import pickle
from pathlib import Path

import pytest
from PIL import Image
from ray.serve.schema import ServeInstanceDetails

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError, ImageError
from apt_ray.images import encode_png
from apt_ray.registry import CHAMPION, RegisteredCategory
from serving.api.access import Access
from serving.api.messages import InspectionRequest
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.orders import (
    FleetStatus,
    Order,
    Orders,
    Plan,
    ReplicaReport,
    StoredVersion,
)
from serving.deploy.deployment import describe_status
from serving.replica.drift import DriftWatches
from serving.replica.follower import Follower
from serving.replica.inspector import Inspector
from serving.settings import Auth, CategoryEntry
from tests.registry.fake import FakeRegistry
from tests.registry.registering import make_prompt_set
from tests.serving.engines import torch_inspector

_TASKS: list[asyncio.Task[None]] = []
PLAN = Plan.parse({"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {"version": 4}}}})


def stocked(prompt_set: PromptSet | None = None) -> FakeRegistry:
    """A registry whose champions are the first of a few versions."""
    registry = FakeRegistry()
    for category, versions in (("nut", 2), ("bolt", 4)):
        for _ in range(versions):
            named = (prompt_set or make_prompt_set("any")).with_category(category)
            registry.register(named, pictures={}, trials=[])
    return registry


async def started(registry: FakeRegistry, folder: Path, *, plan: Plan = PLAN) -> Controller:
    controller = Controller(lambda: registry, Cache(str(folder), "registry"), poll_s=60)
    await controller.plan(plan)
    _TASKS.append(asyncio.create_task(controller.poll_forever()))  # or it would be collected
    return controller


def test_a_move_of_an_alias_reaches_those_who_wait(tmp_path: Path) -> None:
    registry = stocked()

    async def run() -> None:
        controller = await started(registry, tmp_path)
        first = await controller.follow("tail", "r", ReplicaReport())
        versions = {name: order.version for name, order in first.categories.items()}
        assert versions == {"nut": 1, "bolt": 4}
        waiting = asyncio.create_task(
            controller.follow("tail", "r", ReplicaReport(orders=first.etag), wait_s=20)
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        registry.set_alias("nut", CHAMPION, 2)
        await controller.wake("webhook")
        second = await asyncio.wait_for(waiting, 5)
        assert second.categories["nut"].version == 2
        operations = [line["operation"] for line in await controller.audit_lines()]
        assert operations.count("alias moved") == 2  # the first news, and the move
        assert "wake" in operations

    asyncio.run(run())


def test_ten_thousand_categories_are_followed(tmp_path: Path) -> None:
    names = [f"product-{number:05}" for number in range(10_000)]
    registry = FakeRegistry()
    known = {name: RegisteredCategory(aliases={CHAMPION: 1}, threshold=None) for name in names}
    registry.categories = lambda: dict(known)  # type: ignore[method-assign]
    pools = {
        f"pool-{start}": {name: CategoryEntry() for name in names[start : start + 1000]}
        for start in range(0, len(names), 1000)
    }

    async def run() -> None:
        controller = await started(registry, tmp_path, plan=Plan(revision=1, pools=pools))
        routes = await controller.routes("")
        assert set(routes.pools) == set(names)
        assert len(routes.model_dump_json()) < 1e6
        before = {pool: await controller.follow(pool, "r", ReplicaReport()) for pool in pools}
        assert sum(len(orders.categories) for orders in before.values()) == 10_000
        # A move of one concerns the pool that serves it, and no other.
        known[names[1500]] = RegisteredCategory(aliases={CHAMPION: 2}, threshold=None)
        await controller.poll()
        after = {pool: await controller.follow(pool, "r", ReplicaReport()) for pool in pools}
        changed = [pool for pool in pools if after[pool].etag != before[pool].etag]
        assert changed == ["pool-1000"]
        status = await controller.status()
        assert len(status.categories) == 10_000
        assert status.categories[names[1500]].wanted == 2

    asyncio.run(run())


def test_what_gets_a_champion_joins_a_fleet_of_all_categories(tmp_path: Path) -> None:
    registry = stocked()
    everything = {"names_all": True, "joined": "tail"}
    plan = Plan.parse({"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {}}}, **everything})

    async def run() -> None:
        controller = await started(registry, tmp_path, plan=plan)
        await controller.poll()
        known = (await controller.routes("")).etag
        new = make_prompt_set("clip")
        for name in ("clip", "loose"):
            named = new.with_category(name)
            registry.register(named, pictures={}, trials=[], promote=False)
        await controller.poll()
        assert (await controller.routes("")).etag == known  # candidates alone
        waiting = asyncio.create_task(controller.routes(known, wait_s=20))
        await asyncio.sleep(0.05)
        registry.set_alias("clip", CHAMPION, 1)
        registry.set_alias("loose", "best", 1)
        await controller.poll()
        assert (await asyncio.wait_for(waiting, 5)).pools["clip"] == ("tail",)
        orders = await controller.follow("tail", "r", ReplicaReport())
        versions = {name: order.version for name, order in orders.categories.items()}
        assert versions == {"nut": 1, "bolt": 1, "clip": 1}
        status = await controller.status()
        assert (status.newcomers, status.categories["clip"].wanted) == ("served", 1)
        assert (await controller.threshold("clip")).source == "prompt set"
        lines = await controller.audit_lines()
        joined = [line["category"] for line in lines if line["operation"] == "joined"]
        assert joined == ["clip"]
        # A fleet that names its categories, or gives each a pool of its own, takes none in.
        cases: list[tuple[dict[str, object], str]] = [
            ({"names_all": False, "joined": None}, "name"),
            ({"joined": None}, "deploy"),
        ]
        for changed, newcomers in cases:
            await controller.plan(plan.model_copy(update=changed))
            await controller.poll()
            status = await controller.status()
            assert status.newcomers == newcomers
            assert sorted(status.categories) == ["bolt", "nut"]

    asyncio.run(run())


def test_the_status_says_what_share_of_an_image_counts(tmp_path: Path) -> None:
    seam = {"region_of_interest": {"box": [0.999, 0, 0.001, 1]}}
    plan = Plan.parse({"pools": {"tail": {"nut": seam, "bolt": {}}}})

    async def run() -> FleetStatus:
        return await (await started(stocked(), tmp_path, plan=plan)).status()

    status = asyncio.run(run())
    assert status.categories["nut"].counted_share == 1 / 256
    details = ServeInstanceDetails.model_validate(ServeInstanceDetails.get_empty_schema_dict())
    lines = describe_status(details, status)
    nut, bolt = (next(line for line in lines if line.startswith(name)) for name in ("nut", "bolt"))
    assert "0.39% of an image counts" in nut
    assert "counts" not in bolt


def test_the_status_says_which_candidate_waits_and_what_the_last_hour_was(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    registry = stocked(prompt_set)
    data = encode_png(Image.new("RGB", (40, 30), "gray"))

    async def run() -> None:
        controller = await started(registry, tmp_path / "controller")
        line = Line(controller)
        followers: list[asyncio.Task[None]] = []
        for name, images in (("one", 2), ("two", 1)):
            follower, inspector, _ = replica(line, tmp_path / name, name)
            await follower.start(patience_s=20)
            for _ in range(images):
                await inspector.inspect("nut", data, InspectionRequest())
            with pytest.raises(ImageError):
                await inspector.inspect("nut", b"no image", InspectionRequest())
            followers.append(asyncio.create_task(follower.follow_forever()))
        while True:
            status = (await controller.status()).categories
            if (hour := status["nut"].last_hour) and hour.inspected == 3:
                break
            await asyncio.sleep(0.05)
        assert sum(hour.scores) == 3
        assert hour.latency_ms_p50
        assert hour.latency_ms_p95
        assert 0 < hour.latency_ms_p50 <= hour.latency_ms_p95
        assert status["bolt"].last_hour is None
        # Version 2 of nut is the candidate, 1 serves; the plan wants bolt's newest itself.
        assert (status["nut"].candidate, status["bolt"].candidate) == (2, None)
        assert status["nut"].threshold == prompt_set.threshold.value
        registry.set_alias("nut", CHAMPION, 2)
        await controller.poll()
        assert (await controller.status()).categories["nut"].candidate is None
        for task in followers:
            task.cancel()

    asyncio.run(run())


def test_a_replica_of_an_earlier_version_is_heard(tmp_path: Path) -> None:
    report = ReplicaReport.parse({"categories": {"nut": {"version": 1, "source": "registry"}}})
    for message, unknown in ((report, "last_hour"), (report.categories["nut"], "threshold")):
        del message.__dict__[unknown]
    sent = pickle.loads(pickle.dumps(report))  # noqa: S301  # as Ray does

    async def run() -> None:
        controller = await started(stocked(), tmp_path)
        await controller.follow("tail", "r", sent, wait_s=0)
        status = (await controller.status()).categories["nut"]
        assert (status.replicas, status.threshold, status.last_hour) == (1, None, None)

    asyncio.run(run())


def test_without_the_registry_the_last_news_holds(tmp_path: Path) -> None:
    registry = stocked()

    async def run() -> None:
        first = await started(registry, tmp_path)
        assert (await first.follow("tail", "r", ReplicaReport())).categories["nut"].version == 1
        registry.is_away = True
        second = await started(registry, tmp_path)  # as after a restart
        orders = await second.follow("tail", "r", ReplicaReport())
        assert orders.categories["nut"].version == 1
        assert "no registry answers" in (await second.status()).registry
        third = await started(registry, tmp_path / "elsewhere")
        orders = await third.follow("tail", "r", ReplicaReport())
        assert orders.categories["nut"].version is None  # keep what you have

    asyncio.run(run())


def test_the_status_says_what_is_not_as_it_should_be(tmp_path: Path) -> None:
    registry = stocked()

    async def state(controller: Controller, **categories: object) -> tuple[str, str | None]:
        orders = await controller.follow("tail", "r", ReplicaReport(), wait_s=0)
        report = ReplicaReport.parse({"orders": orders.etag, "categories": categories})
        await controller.follow("tail", "r", report, wait_s=0)
        status = (await controller.status()).categories["nut"]
        return status.state, status.problem

    async def run() -> None:
        controller = await started(registry, tmp_path)
        await controller.poll()
        assert (await controller.status()).categories["nut"].state == "IDLE"
        assert await state(controller) == ("LOADING", None)
        assert await state(controller, nut={"version": 1}) == ("READY", None)
        problem = {"version": 1, "problem": "damaged"}
        assert await state(controller, nut=problem) == ("FAILED", "damaged")
        assert (await controller.status()).categories["nut"].failing == ("tail",)
        # What was wrong with the orders of before may be right now.
        mended = {"nut": {"threshold": 0.5}, "bolt": {"version": 4}}
        await controller.plan(Plan.parse({"revision": 2, "pools": {"tail": mended}}))
        assert (await controller.status()).categories["nut"].state == "LOADING"
        assert await state(controller, nut={"version": 1}) == ("READY", None)
        registry.set_alias("nut", CHAMPION, None)
        await controller.poll()
        status, why = await state(controller, nut={"version": 1})
        assert status == "FAILED"
        assert why
        assert "no alias 'champion' for nut; it has candidate" in why
        unknown = Plan.parse({"revision": 2, "pools": {"tail": {"washer": {}}}})
        other = await started(registry, tmp_path, plan=unknown)
        await other.poll()
        assert "no category 'washer'" in str((await other.status()).categories["washer"])
        away = await started(registry, tmp_path, plan=Plan(revision=2))
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

    async def resolve(self, category: str, alias: str) -> int | None:
        if self.cut:
            raise ConnectionError("the line is cut")
        return await self.controller.resolve(category, alias)

    async def fetch(self, category: str, version: int) -> StoredVersion:
        if self.cut:
            raise ConnectionError("the line is cut")
        return await self.controller.fetch(category, version)


def replica(
    line: Line, folder: Path, name: str = "r", *, drift: DriftWatches | None = None
) -> tuple[Follower, Inspector, Access]:
    inspector = torch_inspector(shared=True, drift=drift)
    access = Access(Auth())
    follower = Follower(
        "tail",
        name,
        line,
        cache=Cache(str(folder), "registry"),
        inspector=inspector,
        access=access,
        wait_s=1,
        again_s=0.2,
    )
    return follower, inspector, access


def test_a_replica_follows_and_starts_from_its_cache(tmp_path: Path, prompt_set: PromptSet) -> None:
    registry = stocked(prompt_set)

    async def run() -> None:
        controller = await started(registry, tmp_path / "controller")
        line = Line(controller)
        follower, inspector, _ = replica(line, tmp_path / "replica")
        await follower.start(patience_s=20)
        assert {name: order.version for name, order in inspector.serves().items()} == {
            "nut": 1,
            "bolt": 4,
        }
        following = asyncio.create_task(follower.follow_forever())
        registry.set_alias("nut", CHAMPION, 2)
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


def test_damaged_files_in_the_caches_are_fetched_anew(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    registry = stocked(prompt_set)

    def damage() -> int:
        files = list(tmp_path.glob("*/*/nut/*.safetensors"))
        for file in files:
            data = file.read_bytes()
            file.write_bytes(data[:-5000] + bytes(5000))
        return len(files)

    async def run() -> None:
        controller = await started(registry, tmp_path / "controller")
        first, _, _ = replica(Line(controller), tmp_path / "replica")
        await first.start(patience_s=20)
        assert damage() == 2
        again, inspector, _ = replica(Line(controller), tmp_path / "replica")
        await again.start(patience_s=20)
        assert again.report.categories["nut"].problem is None
        assert inspector.serves()["nut"].version == 1
        for folder in ("controller", "replica"):
            assert Cache(str(tmp_path / folder), "registry").get("nut", 1) is not None

    asyncio.run(run())


def test_one_bad_category_leaves_the_rest_of_its_pool_alone(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    registry = stocked(prompt_set)
    plan = Plan.parse(
        {"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {"false_alarm_rate": 0.01}}}}
    )

    async def run() -> None:
        controller = await started(registry, tmp_path / "controller", plan=plan)
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
    (kept,) = tmp_path.glob("*/nut/*")
    kept.write_bytes(b"y")
    assert cache.get("nut", 1) is None
    cache.put(stored)
    assert cache.get("nut", 1) == stored
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
