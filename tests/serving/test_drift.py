"""Drift of a category, from the images of a replica to the status, the audit and a reset."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray.serve.schema import ServeInstanceDetails

from apt_ray.detection.drift import DriftAlarm, DriftSettings
from apt_ray.detection.prompt_set import PromptSet
from serving.api.messages import InspectionRequest
from serving.controller.controller import Controller
from serving.controller.drift import DriftReport, Drifts
from serving.controller.orders import Order, ReplicaReport, StoredVersion
from serving.deploy.deployment import describe_status
from serving.replica.drift import DriftWatches
from serving.replica.inspector import Inspector
from serving.settings import Fleet
from tests.registry.fake import FakeRegistry
from tests.serving.engines import torch_inspector
from tests.serving.test_controller import Line, replica, started, stocked
from tests.serving.test_root import AUTH
from tests.serving.test_thresholds import operating, problem

RESET = "/fleet/categories/nut/drift/reset"
SETTINGS = DriftSettings(reference=40)


def alarm(stream: str = "brightness", says: str = "images are darker than they were") -> DriftAlarm:
    return DriftAlarm.parse(
        {
            "stream": stream,
            "direction": "lower",
            "says": says,
            "since": "2026-05-04T14:10:00+00:00",
            "at": "2026-05-04T14:12:00+00:00",
            "images": 12,
            "before": 0.5,
            "after": 0.4,
        }
    )


def report(*alarms: DriftAlarm, version: int = 1, reset: str = "") -> ReplicaReport:
    drift = DriftReport(version=version, learning=0, alarms=alarms, reset=reset)
    return ReplicaReport.parse(
        {"categories": {"nut": {"version": version}}, "drift": {"nut": drift}}
    )


async def told(controller: Controller, operation: str) -> list[dict[str, object]]:
    lines = await controller.audit_lines()
    return [line for line in lines if line["operation"] == operation]


def test_an_alarm_stays_in_status_and_audit_until_it_is_reset(tmp_path: Path) -> None:
    async def run() -> None:
        async with operating(stocked(), tmp_path, auth=AUTH) as (controller, client):
            client.headers["Authorization"] = "Bearer boss"

            async def hear(replica: str, said: ReplicaReport) -> str:
                """The reset that the replica is told of."""
                orders = await controller.follow("tail", replica, said, wait_s=0)
                reset = orders.drift_resets.get("nut")
                return reset.id if reset else ""

            await hear("one", report())
            status = (await client.get("/fleet/status")).json()["categories"]
            assert status["nut"]["drift"] == {"learning": 0, "alarms": []}
            assert status["bolt"]["drift"] is None
            # Two replicas see the same, and say so again and again.
            for name in ("one", "two", "one"):
                assert await hear(name, report(alarm())) == ""
            (line,) = await told(controller, "drift")
            assert (line["category"], line["version"], line["replica"]) == ("nut", 1, "one")
            assert (line["stream"], line["since"]) == ("brightness", "2026-05-04T14:10:00+00:00")
            assert (line["before"], line["after"]) == (0.5, 0.4)
            # Who comes after a replica that ended takes what is there for normal; the alarm stays.
            await hear("one", report())
            await hear("two", report())
            drift = (await client.get("/fleet/status")).json()["categories"]["nut"]["drift"]
            assert [each["says"] for each in drift["alarms"]] == [alarm().says]
            details = ServeInstanceDetails.model_validate(
                ServeInstanceDetails.get_empty_schema_dict()
            )
            lines = describe_status(details, await controller.status())
            (nut,) = (line for line in lines if line.startswith("nut"))
            assert "drift: images are darker than they were, since 2026-05-04T14:10" in nut

            cleaned = {"reason": "cleaned the lamp"}
            assert (await client.post(RESET, json=cleaned)).json() == {
                "category": "nut",
                "cleared": ["brightness"],
                "anew": False,
            }
            (line,) = await told(controller, "drift reset")
            assert (line["by"], line["reason"]) == ("boss", "cleaned the lamp")
            # A replica that has not heard of the reset says what it said.
            reset = await hear("one", report(alarm()))
            assert (await controller.status()).categories["nut"].drift.alarms == ()  # type: ignore[union-attr]
            # It has, and the lamp is as dark as before.
            assert await hear("one", report(alarm(), reset=reset)) == reset
            assert len(await told(controller, "drift")) == 2

            problem(await client.post(RESET, json={"reason": "x"}), 422)
            for name, status_code in (("nobody", 401), ("all", 403)):
                client.headers["Authorization"] = f"Bearer {name}"
                problem(await client.post(RESET, json=cleaned), status_code)
            client.headers["Authorization"] = "Bearer boss"
            unknown = RESET.replace("nut", "cog")
            problem(await client.post(unknown, json=cleaned), 404, "cog")

    asyncio.run(run())


def test_an_alarm_is_of_the_version_that_raised_it() -> None:
    drifts = Drifts()
    first = DriftReport(version=1, learning=0, alarms=(alarm(),))
    assert drifts.hear("nut", first) == [alarm()]
    assert drifts.status("nut", {2}, []) is None
    later = DriftReport(version=2, learning=30, alarms=(alarm("score", "parts score higher"),))
    assert [each.stream for each in drifts.hear("nut", later)] == ["score"]
    status = drifts.status("nut", {2}, [later])
    assert status
    assert (status.learning, [each.stream for each in status.alarms]) == (30, ["score"])


def textured(light: float, rng: np.random.Generator) -> bytes:
    """A PNG file of noise, so bright."""
    pixels = rng.normal(light, 3, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def watching(prompt_set: PromptSet) -> tuple[Inspector, Callable[[int], None]]:
    """A replica that watches, and what lets it serve a version."""
    inspector = torch_inspector(shared=True, drift=DriftWatches(SETTINGS))
    data = prompt_set.with_category("nut").to_bytes()

    def serve(version: int) -> None:
        stored = StoredVersion(category="nut", version=version, run_id="", data=data)
        inspector.load("nut", Order(version=version), stored)

    return inspector, serve


def test_a_replica_watches_what_it_inspects(
    watching: tuple[Inspector, Callable[[int], None]],
) -> None:
    inspector, serve = watching
    serve(1)
    rng = np.random.default_rng(0)

    async def inspect(images: int, light: float) -> None:
        for _ in range(images):
            await inspector.inspect("nut", textured(light, rng), InspectionRequest())

    async def run() -> None:
        assert inspector.drift() == {}
        await inspect(30, 128)
        assert inspector.drift()["nut"].learning == 10
        await inspect(30, 128)
        assert inspector.drift()["nut"] == DriftReport(version=1, learning=0)
        await inspect(25, 100)
        found = inspector.drift()["nut"]
        assert "images are darker than they were" in [each.says for each in found.alarms]
        drifts = Drifts()
        drifts.reset("nut", anew=False)
        for _ in range(2):  # the second time it is no news
            inspector.reset_drift(drifts.resets)
            await inspect(1, 128)
        found = inspector.drift()["nut"]
        assert (found.learning, found.alarms, found.reset) == (0, (), drifts.resets["nut"].id)
        # Another version scores otherwise, and learns anew.
        serve(2)
        await inspect(1, 128)
        assert inspector.drift()["nut"].version == 2
        assert inspector.drift()["nut"].learning == 39
        inspector.drop("nut")
        assert inspector.drift() == {}

    asyncio.run(run())


def test_a_replica_tells_the_controller_and_obeys_its_resets(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    registry: FakeRegistry = stocked(prompt_set)
    rng = np.random.default_rng(0)

    async def run() -> None:
        controller = await started(registry, tmp_path / "controller")
        follower, inspector, _ = replica(
            Line(controller), tmp_path / "replica", drift=DriftWatches(SETTINGS)
        )
        await follower.start(patience_s=20)
        following = asyncio.create_task(follower.follow_forever())
        await inspector.inspect("nut", textured(128, rng), InspectionRequest())
        while not (drift := (await controller.status()).categories["nut"].drift):
            await asyncio.sleep(0.05)
        assert (drift.learning, drift.alarms) == (39, ())
        await controller.reset_drift("nut", anew=True, reason="a new lamp", by="boss")
        while inspector.drift()["nut"].learning != 40:
            await asyncio.sleep(0.05)
        following.cancel()

    asyncio.run(run())


def test_the_fleet_file_turns_it_off(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("drift: null\n")
    assert Fleet.read(file).drift is None
    file.write_text("drift: {reference: 2000}\n")
    assert Fleet.read(file).drift == DriftSettings(reference=2000)
