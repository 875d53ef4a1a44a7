"""Candidates behind the answers: told from what serves, kept, asked for by a promotion."""

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from ray.serve.schema import ServeInstanceDetails

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import FleetError
from apt_ray.features.clip import FrozenCLIP
from apt_ray.levels import Reading
from apt_ray.registry import CHAMPION
from serving.api.access import Access
from serving.api.history import KeptCandidate
from serving.api.messages import InspectionRequest
from serving.api.moves import add_moves
from serving.api.pools import Answering, Pools
from serving.api.problems import install
from serving.api.root import create_root_api
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.moves import MoveOrder, MoveResult
from serving.controller.orders import Order, Plan, Routes, pair_of
from serving.controller.shadow import (
    ShadowCounts,
    ShadowOrder,
    ShadowReport,
    Shadows,
    ShadowStatus,
    shift_bin,
)
from serving.deploy.deployment import describe_status
from serving.deploy.plan import HttpAddress, pools_of, serve_config
from serving.replica.batching import Batcher
from serving.replica.beside import Beside
from serving.replica.follower import Follower
from serving.replica.history import History
from serving.replica.inspector import Inspector
from serving.replica.served import ServedCategory, build
from serving.replica.shadow import Answered, Shadow
from serving.settings import Auth, CategoryShadow, Fleet, HistorySettings
from tests.registry.fake import FakeRegistry
from tests.serving.engines import torch_inspector
from tests.serving.test_beside import CountingLine
from tests.serving.test_ingress import png
from tests.serving.test_root import LIMITS

ALL = {"share": 1}
WHY = {"reason": "it was tried for a week"}


def version(prompt_set: PromptSet, threshold: float, **provenance: object) -> PromptSet:
    """The same, but for its threshold."""
    fixed = prompt_set.threshold.model_copy(update={"value": threshold})
    said = prompt_set.provenance.model_copy(update={"threshold": fixed, **provenance})
    return replace(prompt_set, provenance=said).with_category("nut")


class Counted:
    """A meter that counts what becomes of tried images."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def tried(self, category: str, version: int, candidate: int, outcome: str) -> None:
        assert (category, version) == ("nut", 1)
        self.outcomes.append(outcome)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Floor:
    """A controller, and replicas that come and go; the first version serves, the last waits."""

    def __init__(self, folder: Path, *versions: PromptSet, **shadow: object) -> None:
        self.folder = folder
        self.registry = FakeRegistry()
        for each in versions:
            self.registry.register(each, pictures={}, trials=[])
        self.shadow = ALL | shadow
        self.promoted: list[MoveOrder] = []
        self.following: list[asyncio.Task[None]] = []
        self.meter = Counted()

    async def start_controller(self) -> None:
        self.controller = Controller(
            lambda: self.registry,
            Cache(str(self.folder / "controller"), "registry"),
            poll_s=60,
            promoting=self._promote,
        )
        self.line = CountingLine(self.controller)
        pools = {"tail": {"nut": {}}}
        await self.controller.plan(
            Plan.parse({"revision": 1, "pools": pools, "shadow": self.shadow})
        )
        self.following.append(asyncio.create_task(self.controller.poll_forever()))

    async def _promote(self, order: MoveOrder) -> MoveResult:
        self.promoted.append(order)
        return MoveResult(moved=True, version=order.version or 0, why="it is as good")

    async def start_replica(
        self, name: str = "r", *, images: int = 0, disagreements: int = 100
    ) -> Inspector:
        self.history = History(
            HistorySettings(images=images, folder=str(self.folder / "history")),
            "registry",
            disagreements=disagreements,
        )
        cache = Cache(str(self.folder / name), "registry")
        inspector = torch_inspector(
            shared=True,
            beside=Beside(self.line, cache),
            history=self.history,
            meter=self.meter,  # type: ignore[arg-type]
        )
        follower = Follower(
            "tail",
            name,
            self.line,
            cache=cache,
            inspector=inspector,
            access=Access(Auth()),
            wait_s=0.1,
            again_s=0.1,
        )
        await follower.start(patience_s=20)
        self.following.append(asyncio.create_task(follower.follow_forever()))
        return inspector

    async def stop(self) -> None:
        for task in self.following:
            task.cancel()
        await asyncio.gather(*self.following, return_exceptions=True)
        self.following.clear()

    async def status(self, images: int) -> ShadowStatus:
        """What the controller says, once it has heard of so many images."""
        deadline = time.monotonic() + 20
        while True:
            status = await self.controller.shadow("nut")
            if status and status.images == images:
                return status
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.02)

    async def audit(self, operation: str) -> list[dict[str, object]]:
        lines = await self.controller.audit_lines()
        return [line for line in lines if line["operation"] == operation]

    def api(self, inspector: Inspector) -> FastAPI:
        access = Access(Auth())
        pools = Pools(lambda pool: Answering(inspector, self.history), access)
        pools.follow(Routes(pools={"nut": ("tail",)}))
        return create_root_api(
            pools, self.controller, http=LIMITS, access=access, webhook_secret=""
        )


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def warm(inspector: Inspector) -> None:
    """The first image lets the candidate be loaded, and is not tried."""
    await until(lambda: inspector.serves()["nut"].version == 1)
    await inspector.inspect("nut", png(), InspectionRequest(id="first"))
    await until(lambda: inspector.shadows()["nut"].is_loaded)


async def tried(inspector: Inspector, *names: str) -> None:
    """Inspect images of these request ids, and return when the candidate has scored them."""
    before = inspector.shadows()["nut"].counts.images
    for name in names:
        await inspector.inspect("nut", png(), InspectionRequest(id=name))
    await until(lambda: inspector.shadows()["nut"].counts.images == before + len(names))


async def get(api: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://fleet"
    ) as client:
        return await client.get(path)


def run(
    folder: Path, work: Callable[[Floor], Awaitable[None]], *versions: PromptSet, **shadow: object
) -> None:
    """Do something with a controller on a floor."""

    async def whole() -> None:
        floor = Floor(folder, *versions, **shadow)
        await floor.start_controller()
        try:
            await work(floor)
        finally:
            await floor.stop()

    asyncio.run(whole())


def test_a_candidate_that_differs_is_told_from_what_serves(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    async def work(floor: Floor) -> None:
        inspector = await floor.start_replica()
        api = floor.api(inspector)
        await warm(inspector)
        empty = (await get(api, "/v1/nut/shadow")).json()
        assert (empty["images"], empty["agreement"], empty["since"]) == (0, None, None)
        assert (await get(api, "/v1/nut/history")).status_code == 404  # none is kept
        await tried(inspector, "a", "b", "c")
        await floor.status(images=3)
        found = (await get(api, "/v1/nut/shadow?limit=2")).json()
        assert (found["champion"], found["candidate"], found["share"]) == (1, 2, 1.0)
        assert (found["images"], found["agreement"]) == (3, 0.0)
        assert (found["candidate_rejects"], found["champion_rejects"]) == (3, 0)
        assert (found["shift_mean"], found["shift_p05"], found["shift_p95"]) == (0.0, 0.0, 0.0)
        assert (found["replicas"], found["dropped"], found["problem"]) == (1, 0, None)
        assert found["since"] > "2025"
        # The images on which they disagree are kept, though others are not.
        await until(lambda: len(list((tmp_path / "history").rglob("nut.sqlite"))) == 1)
        deadline = time.monotonic() + 20
        while [each["request_id"] for each in found["disagreements"]] != ["c", "b"]:
            assert time.monotonic() < deadline
            found = (await get(api, "/v1/nut/shadow?limit=2")).json()
        kept = found["disagreements"][0]
        assert (kept["version"], kept["is_anomalous"]) == (1, False)
        assert kept["candidate"] == {
            "version": 2,
            "score": pytest.approx(kept["score"], abs=1e-6),
            "threshold": 0.0,
            "is_anomalous": True,
        }
        image = await get(api, f"/v1/nut/history/{kept['id']}/image")
        assert image.headers["content-type"] == "image/jpeg"
        listed = await get(api, "/v1/nut/history?only=disagreeing")
        assert [each["request_id"] for each in listed.json()["inspections"]] == ["c", "b", "a"]

        status = await floor.controller.status()
        details = ServeInstanceDetails.model_validate(ServeInstanceDetails.get_empty_schema_dict())
        (line,) = (each for each in describe_status(details, status) if each.startswith("nut"))
        assert "version 2 beside 1 agrees on 0.00% of 3 images, rejects 3 more and 0 fewer" in line
        assert floor.meter.outcomes == ["candidate rejects"] * 3
        # It takes over, and nobody is tried any more.
        floor.registry.set_alias("nut", CHAMPION, 2)
        await floor.controller.poll()
        (begun,) = await floor.audit("shadow begins")
        assert (begun["champion"], begun["candidate"], begun["share"]) == (1, 2, 1.0)
        (ended,) = await floor.audit("shadow ends")
        assert (ended["candidate"], ended["images"], ended["agreement"]) == (2, 3, 0.0)
        await until(lambda: not inspector.shadows())
        gone = await get(api, "/v1/nut/shadow")
        assert (gone.status_code, gone.json()["title"]) == (404, "No shadow")
        assert "share" in gone.json()["remedy"]
        assert (await get(api, "/v1/cog/shadow")).json()["title"] == "Unknown category"

    run(tmp_path, work, version(prompt_set, 1.0), version(prompt_set, 0.0))


def test_a_candidate_that_is_equal_agrees_on_all(tmp_path: Path, prompt_set: PromptSet) -> None:
    async def work(floor: Floor) -> None:
        inspector = await floor.start_replica()
        await warm(inspector)
        await tried(inspector, *map(str, range(5)))
        status = await floor.status(images=5)
        assert (status.agreement, status.both_pass, status.both_reject) == (1.0, 0, 5)
        assert (status.shift_p05, status.shift_p50, status.shift_p95) == (0.0, 0.0, 0.0)
        assert floor.meter.outcomes == ["agrees"] * 5
        assert not list((tmp_path / "history").rglob("*"))

    run(tmp_path, work, version(prompt_set, 0.0), version(prompt_set, 0.0))


def test_a_candidate_that_reads_files_otherwise_is_tried_all_the_same(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    other = version(prompt_set, 1.0, reading=Reading(white_level=1023, ground="black"))

    async def work(floor: Floor) -> None:
        inspector = await floor.start_replica()
        await warm(inspector)
        await tried(inspector, "a", "b")
        assert (await floor.status(images=2)).champion_rejects == 2

    run(tmp_path, work, version(prompt_set, 0.0), other)


def test_counts_outlive_replicas_and_controllers(tmp_path: Path, prompt_set: PromptSet) -> None:
    async def work(floor: Floor) -> None:
        first = await floor.start_replica("first")
        await warm(first)
        await tried(first, "a", "b")
        since = (await floor.status(images=2)).since
        await floor.controller.poll()
        await floor.stop()  # with the controller
        await floor.start_controller()
        second = await floor.start_replica("second")
        await warm(second)
        await tried(second, "c")
        status = await floor.status(images=2 + 1)
        assert status.since == since
        await floor.controller.poll()
        await floor.stop()
        await floor.start_controller()
        assert (await floor.status(images=3)).since == since
        # Another threshold is another verdict: it begins anew.
        await floor.controller.set_threshold("nut", 0.9, reason="a test", by="boss")
        assert (await floor.status(images=0)).candidate == 2

    run(tmp_path, work, version(prompt_set, 0.0), version(prompt_set, 0.0))


def test_a_promotion_asks_for_images_on_which_both_agree(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    async def work(floor: Floor) -> None:
        api = FastAPI()
        install(api)
        add_moves(api, floor.controller, Access(Auth()))

        async def promote(**asked: Any) -> httpx.Response:
            transport = httpx.ASGITransport(api)
            async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
                return await client.post("/fleet/categories/nut/promote", json=WHY | asked)

        async def promoted(answer: httpx.Response) -> MoveOrder:
            assert answer.status_code == 202, answer.text
            await until(lambda: bool(floor.promoted))
            return floor.promoted.pop()

        inspector = await floor.start_replica()
        refused = await promote()
        assert (refused.status_code, refused.json()["title"]) == (409, "Not tried enough")
        assert "on 0 of 0 images; its promotion asks for 3 on which" in refused.json()["detail"]
        assert "force" in refused.json()["remedy"]
        await warm(inspector)
        await tried(inspector, "a", "b")
        await floor.status(images=2)
        for less in ({}, {"required_images": 0}):
            assert "on 2 of 2 images (100.00%)" in (await promote(**less)).json()["detail"]
        assert (await promoted(await promote(force=True))).version is None
        await tried(inspector, "c")
        await floor.status(images=3)
        # The very version that was tried, whatever the alias says by then.
        assert (await promoted(await promote())).version == 2
        more = await promote(required_images=4)
        assert (more.status_code, "asks for 4" in more.json()["detail"]) == (409, True)
        # A newer candidate has shown nothing yet.
        floor.registry.register(version(prompt_set, 1.0), pictures={}, trials=[])
        await floor.controller.poll()
        assert "version 3 of nut" in (await promote()).json()["detail"]
        await until(lambda: "nut" not in inspector.shadows())
        await warm(inspector)
        await tried(inspector, "a", "b", "c", "d")
        await floor.status(images=4)
        apart = await promote()
        assert "on 0 of 4 images (0.00%)" in apart.json()["detail"]

    pair = version(prompt_set, 0.0), version(prompt_set, 0.0)
    run(tmp_path, work, *pair, required_images=3, required_agreement=0.9)


def answered(champion: ServedCategory, image: bytes = b"") -> Answered:
    backbone = champion.detector.backbone
    features = backbone.encode_images(backbone.preprocess([Image.new("RGB", (9, 9))] * 2))
    _, scores_B = champion.detector.score(features)
    return Answered(
        champion=champion, score=float(scores_B[1]), features=features, row=1, data=image
    )


class Shelf:
    """Has the candidate."""

    def __init__(self, candidate: ServedCategory) -> None:
        self.candidate = candidate
        self.held: list[tuple[str, Order]] = []
        self.is_broken = False

    async def get(self, category: str, order: Order, prepare: object) -> ServedCategory:
        assert (category, order.version) == ("nut", 2)
        if self.is_broken:
            raise FleetError("it is damaged: fit it again")
        return self.candidate

    def hold(self, versions: list[tuple[str, Order]]) -> None:
        self.held = versions


class Trial:
    """What tries the second version beside the first, when it is let."""

    def __init__(self, prompt_set: PromptSet, backbone: FrozenCLIP, share: float = 1.0) -> None:
        # Fitted to darker images it still reads files alike: what was found in them serves both.
        darker = prompt_set.reading.model_copy(update={"peak": 0.125})
        self.champion, candidate = (
            build(
                version(prompt_set, 0.0, **said), Order(version=n), backbone, version=n, run_id=""
            )
            for n, said in ((1, {}), (2, {"reading": darker}))
        )
        self.shelf = Shelf(candidate)
        self.idle = asyncio.Event()
        self.now = 1.7e9
        self.shadow = Shadow(
            self.shelf,  # type: ignore[arg-type]
            prepare=lambda *_: candidate,
            when_idle=self.when_idle,
            pixels=lambda *_: torch.empty(0),
            clock=lambda: self.now,
        )
        pair = pair_of(self.champion.order, 2)
        self.order = ShadowOrder(champion=1, candidate=2, share=share, pair=pair)
        self.shadow.follow({"nut": self.order})
        self.told: list[KeptCandidate | None] = []

    async def when_idle(self, work: Callable[[], Any]) -> Any:
        await self.idle.wait()
        return work()

    def try_on(self, image: bytes = b"") -> None:
        self.shadow.try_on(answered(self.champion, image), self.told.append)

    @property
    def counts(self) -> ShadowCounts:
        return self.shadow.reports()["nut"].counts


def test_a_share_is_chosen_by_request_id_always_the_same(
    prompt_set: PromptSet, backbone: FrozenCLIP
) -> None:
    async def work() -> None:
        names = [uuid.UUID(int=number).hex for number in range(5000)]
        found = [
            {
                name
                for name in names
                if Trial(prompt_set, backbone, share).shadow.chooses("nut", name)
            }
            for share in (0.1, 0.1, 0.5, 1.0)
        ]
        assert found[0] == found[1] < found[2] < found[3] == set(names)
        assert 400 < len(found[0]) < 600
        trial = Trial(prompt_set, backbone)
        assert not trial.shadow.chooses("bolt", names[0])
        trial.shadow.follow({})
        assert not trial.shadow.chooses("nut", names[0])

    asyncio.run(work())


def test_what_there_is_no_time_for_is_dropped_and_counted(
    prompt_set: PromptSet, backbone: FrozenCLIP
) -> None:
    async def work() -> None:
        trial = Trial(prompt_set, backbone)
        trial.try_on()  # lets it be loaded
        assert trial.told == [None]
        await until(lambda: trial.shadow.reports()["nut"].is_loaded)
        for _ in range(20):
            trial.try_on()
        assert len(trial.told) == 1 + 4  # the others wait
        assert (trial.counts.images, trial.counts.dropped) == (0, 4)
        trial.idle.set()
        await until(lambda: trial.counts.images == 16)
        # Images as large as these wait one at a time.
        trial.idle.clear()
        for _ in range(3):
            trial.try_on(bytes(40 * 2**20))
        assert trial.counts.dropped == 4 + 2
        trial.idle.set()
        await until(lambda: trial.counts.images == 17)
        verdicts = [told for told in trial.told if told is not None]
        assert {(each.version, each.is_anomalous) for each in verdicts} == {(2, True)}
        assert len(verdicts) == trial.counts.both_reject == trial.counts.shifts[0] == 17

    asyncio.run(work())


def test_a_candidate_that_cannot_be_loaded_is_said_and_tried_again_later(
    prompt_set: PromptSet, backbone: FrozenCLIP
) -> None:
    async def work() -> None:
        trial = Trial(prompt_set, backbone)
        trial.shelf.is_broken = True
        trial.try_on()
        await until(lambda: trial.shadow.reports()["nut"].problem is not None)
        report = trial.shadow.reports()["nut"]
        shadows = Shadows()
        shadows.follow({"nut": trial.order})
        status = shadows.status("nut", [report])
        assert status
        assert (status.problem, status.replicas) == ("it is damaged: fit it again", 0)
        trial.shelf.is_broken = False
        trial.try_on()
        await asyncio.sleep(0.05)
        assert not trial.shadow.reports()["nut"].is_loaded
        trial.now += 61
        trial.try_on()
        await until(lambda: trial.shadow.reports()["nut"].is_loaded)
        assert trial.shadow.reports()["nut"].problem is None
        assert [(name, order.version) for name, order in trial.shelf.held] == [("nut", 2)]
        # Nobody is tried beside what the orders do not name.
        trial.shadow.follow({"nut": trial.order.model_copy(update={"pair": "another"})})
        trial.try_on()
        assert (trial.shadow.reports(), trial.shelf.held) == ({}, [])

    asyncio.run(work())


def test_an_image_waits_for_one_that_is_tried_at_most() -> None:
    done: list[str] = []
    begun, hold = threading.Event(), threading.Event()

    def first() -> str:
        begun.set()
        hold.wait()
        done.append("first")
        return "first"

    async def work() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher: Batcher[str, str] = Batcher(
                lambda items: done.extend(items) or list(items),  # type: ignore[func-returns-value]
                executor=executor,
                max_batch_size=1,
            )
            idle = [asyncio.create_task(batcher.when_idle(first))]
            idle += [asyncio.create_task(batcher.when_idle(lambda: done.append("second")))]  # type: ignore[arg-type]
            broken = asyncio.create_task(batcher.when_idle(lambda: 1 // 0))
            await asyncio.to_thread(begun.wait)
            images = [asyncio.create_task(batcher.submit("nut", name)) for name in "ab"]
            await asyncio.sleep(0.01)
            hold.set()
            assert await asyncio.gather(*images) == ["a", "b"]
            assert await idle[0] == "first"
            with pytest.raises(ZeroDivisionError):
                await broken
            assert await batcher.submit("nut", "c") == "c"
        assert done == ["first", "a", "b", "second", "c"]

    asyncio.run(work())


def counts(**values: Any) -> ShadowCounts:
    return ShadowCounts.parse(values)


def test_counts_of_replicas_add_up_and_are_told_twice_without_harm() -> None:
    order = ShadowOrder(champion=1, candidate=2, share=0.1, pair="one")
    shadows = Shadows()
    assert shadows.follow({"nut": order}) == (["nut"], {})

    def hear(name: str, since: str, **values: Any) -> None:
        report = ShadowReport(id=name, pair="one", since=since, counts=counts(**values))
        shadows.hear("nut", report)
        shadows.hear("nut", report)
        shadows.hear("nut", report.model_copy(update={"pair": "another"}))
        shadows.hear("bolt", report)

    places = {shift_bin(shift): 1 for shift in (-0.5, -0.0124, 0.0, 0.004, 0.5)}
    hear("a", "2026-05-04T14:10:00+00:00", both_pass=4, candidate_rejects=1, shifts=places)
    hear("b", "2026-05-04T14:09:00+00:00", both_reject=2, champion_rejects=3, dropped=7, shift=2.5)
    # A replica that is replaced again and again is remembered, in bounded room.
    for number in range(200):
        hear(str(number), "2026-05-05T00:00:00+00:00", both_pass=1)
    again = Shadows(type(shadows.kept).model_validate_json(shadows.kept.model_dump_json()))
    assert len(again.kept.categories["nut"].counts) < 100
    status = again.status("nut", [])
    assert status
    assert (status.images, status.dropped, status.both_pass) == (210, 7, 204)
    assert (status.candidate_rejects, status.champion_rejects) == (1, 3)
    assert status.agreement == pytest.approx(206 / 210)
    assert status.shift_mean == pytest.approx(2.5 / 210)
    assert (status.shift_p05, status.shift_p50, status.shift_p95) == (-0.5, 0.0, 0.5)
    assert status.since == "2026-05-04T14:09:00+00:00"
    assert again.follow({"nut": order.model_copy(update={"share": 0.5})}) == ([], {})
    begun, ended = again.follow({"nut": order.model_copy(update={"pair": "two"})})
    assert (begun, ended["nut"].images) == (["nut"], 210)


def test_the_fleet_file_says_it_for_all_and_for_one(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "pool: tail\npools: {tail: {}}\nshadow: {share: 0.1, required_images: 500}\n"
        "categories: {nut: {shadow: {share: 0}}, bolt: {shadow: {required_agreement: 0.9}}, cog: }"
    )
    fleet = Fleet.read(file)
    assert (fleet.shadow.images, Fleet().shadow.share) == (100, 0)
    assert isinstance(fleet.categories, dict)
    config = serve_config(
        fleet,
        pools_of(fleet, fleet.categories),
        revision=1,
        deployed_by="me",
        tracking_uri="http://127.0.0.1:1",
        address=HttpAddress(host="127.0.0.1", port=1),
        gpus=False,
    )
    (controller,) = (each for each in config["applications"] if each["name"] == "controller")
    plan = Plan.parse(controller["deployments"][0]["user_config"])
    entries = plan.pools["tail"]
    assert entries["nut"].shadow == CategoryShadow(share=0, required_images=500)
    wanted = CategoryShadow(share=0.1, required_images=500, required_agreement=0.9)
    assert entries["bolt"].shadow == wanted
    assert entries["cog"].shadow is None
    assert plan.shadow == CategoryShadow(share=0.1, required_images=500)
    for wrong in ("share: 1.1", "share: -1", "required_images: x", "pictures: 4"):
        file.write_text(f"shadow: {{{wrong}}}")
        with pytest.raises(FleetError, match="shadow"):
            Fleet.read(file)
