"""The candidate beside what serves: loaded on demand, counted nowhere, and in nobody's way."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import RegistryUnavailableError
from apt_ray.registry import CANDIDATE, CHAMPION
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.messages import Alias, InspectionReport, InspectionRequest
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.orders import Order, Plan, StoredVersion
from serving.replica.beside import Beside
from serving.settings import Auth, Decision, HttpLimits
from tests.registry.fake import FakeRegistry
from tests.serving.engines import torch_inspector
from tests.serving.test_controller import Line, started
from tests.serving.test_ingress import png

KEPT = 4


class CountingLine(Line):
    """Counts what is fetched."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(controller)
        self.fetched: list[tuple[str, int]] = []

    async def fetch(self, category: str, version: int) -> StoredVersion:
        self.fetched.append((category, version))
        return await super().fetch(category, version)


class KeptVersions:
    """A history that keeps which version answered."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def keep(self, report: InspectionReport, **_: object) -> None:
        self.versions.append(report.version)


class Bench:
    """A replica that serves the first version of each category; the second is the candidate."""

    def __init__(self, prompt_set: PromptSet, folder: Path, *names: str) -> None:
        self.registry = FakeRegistry()
        self.folder = folder
        self.names = names or ("nut",)
        for name in self.names:
            for threshold in (1.0, 0.0):
                fixed = prompt_set.threshold.model_copy(update={"value": threshold})
                provenance = prompt_set.provenance.model_copy(update={"threshold": fixed})
                version = replace(prompt_set, provenance=provenance).with_category(name)
                self.registry.register(version, pictures={}, trials=[])

    async def start(self, **order: Any) -> None:
        plan = Plan.parse({"revision": 1, "pools": {"tail": {name: {} for name in self.names}}})
        controller = await started(self.registry, self.folder / "controller", plan=plan)
        await controller.poll()
        self.controller, self.line = controller, CountingLine(controller)
        cache = Cache(str(self.folder / "replica"), "registry")
        self.history = KeptVersions()
        self.inspector = torch_inspector(
            beside=Beside(self.line, cache),
            history=self.history,  # type: ignore[arg-type]
        )
        for name in self.names:
            stored = await controller.fetch(name, 1)
            self.inspector.load(name, Order(version=1, **order), stored)

    async def ask(self, alias: Alias | None, name: str = "nut") -> tuple[int, bool]:
        found = await self.inspector.inspect(name, png(), InspectionRequest(alias=alias))
        return found.report.version, found.report.is_anomalous

    @property
    def counted(self) -> int:
        return sum(sum(counts.scores) for counts in self.inspector.last_hour().values())


def test_the_candidate_answers_beside_what_serves_and_counts_nowhere(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    bench = Bench(prompt_set, tmp_path)

    async def run() -> None:
        await bench.start()
        aliases: list[Alias | None] = [None, "candidate", "champion", "candidate", "candidate"]
        found = await asyncio.gather(*(bench.ask(alias) for alias in aliases))
        champion, candidate = (1, False), (2, True)
        assert found == [champion, candidate, champion, candidate, candidate]
        assert (bench.counted, bench.history.versions) == (1, [1])
        assert bench.line.fetched == [("nut", 2)]
        assert bench.inspector.serves()["nut"].version == 1
        # The alias decides at each request, whatever serves.
        bench.registry.set_alias("nut", CANDIDATE, 1)
        bench.registry.set_alias("nut", CHAMPION, 2)
        await bench.controller.poll()
        assert [await bench.ask(alias) for alias in ("candidate", "champion")] == [  # type: ignore[arg-type]
            champion,
            candidate,
        ]

    asyncio.run(run())


def test_the_candidate_is_decided_as_what_serves(tmp_path: Path, prompt_set: PromptSet) -> None:
    bench = Bench(prompt_set, tmp_path)

    async def run() -> None:
        await bench.start(decision=Decision(threshold=1.0))
        assert await bench.ask("candidate") == (2, False)

    asyncio.run(run())


def test_a_version_that_takes_over_takes_no_image_from_the_candidate(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    bench = Bench(prompt_set, tmp_path)

    async def run() -> None:
        await bench.start()
        assert await bench.ask("candidate") == (2, True)
        asked = [asyncio.create_task(bench.ask("candidate")) for _ in range(6)]
        stored = await bench.controller.fetch("nut", 1)
        await asyncio.to_thread(bench.inspector.load, "nut", Order(version=1), stored)
        assert set(await asyncio.gather(*asked)) == {(2, True)}

    asyncio.run(run())


def test_only_the_last_few_are_kept_and_none_pushes_out_what_serves(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    names = tuple(f"part{number}" for number in range(KEPT + 1))
    bench = Bench(prompt_set, tmp_path, *names)

    async def run() -> None:
        await bench.start()
        for name in (*names, *names[1:]):
            await bench.ask("candidate", name)
        assert bench.line.fetched == [(name, 2) for name in names]
        await bench.ask("candidate", names[0])
        assert bench.line.fetched[-1] == (names[0], 2)

    asyncio.run(run())
    assert {file.name[0] for file in tmp_path.glob("*/*/*/*.safetensors")} == {"1"}


def test_whoever_asks_for_what_cannot_be_had_is_told_why(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    bench = Bench(prompt_set, tmp_path)

    async def run() -> None:
        await bench.start()
        api = create_api(bench.inspector, http=HttpLimits(), access=Access(Auth()))
        transport = httpx.ASGITransport(api)

        async def ask(alias: str) -> tuple[int, str]:
            async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
                answer = await client.post(f"/v1/nut/inspect?alias={alias}", content=png())
            return answer.status_code, str(answer.json().get("title", answer.json().get("version")))

        bench.line.cut = True
        assert await ask("candidate") == (503, "Busy")
        bench.line.cut = False
        bench.registry.is_away = True
        assert await ask("candidate") == (503, "Busy")
        bench.registry.is_away = False
        assert await ask("candidate") == (200, "2")
        other = prompt_set.provenance.model_copy(update={"fingerprint": "0" * 32})
        foreign = replace(prompt_set, provenance=other).with_category("nut")
        bench.registry.register(foreign, pictures={}, trials=[])
        await bench.controller.poll()
        assert await ask("candidate") == (409, "Unusable version")
        bench.registry.set_alias("nut", CANDIDATE, None)
        await bench.controller.poll()
        assert await ask("candidate") == (404, "No candidate")
        assert (await ask("staging"))[0] == 422
        assert bench.counted == 0

    asyncio.run(run())


def test_a_caller_who_goes_away_ends_nobody_elses_loading(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    bench = Bench(prompt_set, tmp_path)

    async def run() -> None:
        await bench.start()
        impatient = asyncio.create_task(bench.ask("candidate"))
        patient = asyncio.create_task(bench.ask("candidate"))
        while not bench.line.fetched:
            await asyncio.sleep(0.001)
        impatient.cancel()
        assert await patient == (2, True)
        assert bench.line.fetched == [("nut", 2)]

    asyncio.run(run())


def test_before_the_registry_has_said_anything_nothing_is_said_to_be_absent(
    tmp_path: Path,
) -> None:
    registry = FakeRegistry()
    registry.is_away = True

    async def run() -> None:
        controller = await started(registry, tmp_path, plan=Plan(revision=1))
        await controller.poll()
        with pytest.raises(RegistryUnavailableError):
            await controller.resolve("nut", CANDIDATE)

    asyncio.run(run())
