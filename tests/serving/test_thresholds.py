"""What operators do, through the root and a controller of their own, without a cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from ray.serve.schema import ServeInstanceDetails

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.registry import CHAMPION
from serving.api.access import Access
from serving.api.pools import Answering, Pools
from serving.api.root import create_root_api
from serving.controller.controller import Controller
from serving.controller.orders import Plan, ReplicaReport, Routes
from serving.deploy.deployment import describe_status
from serving.settings import Auth
from tests.registry.fake import FakeRegistry
from tests.serving.test_controller import Line, replica, started, stocked
from tests.serving.test_root import AUTH, LIMITS

THRESHOLD = "/fleet/categories/nut/threshold"
PLAN = Plan.parse({"revision": 1, "pools": {"tail": {"nut": {}, "bolt": {"threshold": 0.3}}}})


@asynccontextmanager
async def operating(
    registry: FakeRegistry, folder: Path, *, plan: Plan = PLAN, auth: Auth | None = None
) -> AsyncIterator[tuple[Controller, httpx.AsyncClient]]:
    """A controller, and a client of the root before it."""
    controller = await started(registry, folder, plan=plan)
    await controller.poll()
    access = Access(Auth())
    pools = Pools(lambda pool: Answering(None), access)  # type: ignore[arg-type]
    pools.follow(Routes(pools={"nut": ("tail",), "bolt": ("tail",)}, auth=auth or Auth()))
    root = create_root_api(pools, controller, http=LIMITS, access=access, webhook_secret="")
    transport = httpx.ASGITransport(root, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        yield controller, client


def problem(answer: httpx.Response, status: int, says: str = "") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    assert says in found["detail"]
    assert found["remedy"]
    return found


def test_a_threshold_of_an_operator_rules_until_it_is_taken_back(
    tmp_path: Path, prompt_set: PromptSet
) -> None:
    registry = stocked(prompt_set)

    async def run() -> None:
        async with operating(registry, tmp_path / "one", auth=AUTH) as (controller, client):
            client.headers["Authorization"] = "Bearer boss"
            assert (await client.get(THRESHOLD)).json() == {
                "category": "nut",
                "source": "prompt set",
                "threshold": None,
                "reason": "",
                "by": "",
                "at": None,
            }
            follower, inspector, _ = replica(Line(controller), tmp_path / "replica")
            await follower.start(patience_s=20)
            following = asyncio.create_task(follower.follow_forever())
            body = {"threshold": 0.41, "reason": "  dust on the lens  "}
            said = (await client.put(THRESHOLD, json=body)).json()
            assert said == (await client.get(THRESHOLD)).json()
            assert (said["source"], said["threshold"], said["by"]) == ("operator", 0.41, "boss")
            assert (said["reason"], said["at"][-6:]) == ("dust on the lens", "+00:00")
            while (about := await inspector.describe("nut")).threshold != 0.41:
                await asyncio.sleep(0.02)
            assert (about.threshold_source, about.version) == ("operator", 1)
            assert about.certified_false_alarm_rate is None
            (line,) = [
                line
                for line in await controller.audit_lines()
                if line["operation"] == "threshold" and line["category"] == "nut"
            ]
            assert (line["value"], line["by"], line["reason"]) == (0.41, "boss", "dust on the lens")
            # It outlives a new version, a deploy and the controller, whatever the fleet file says.
            registry.set_alias("nut", CHAMPION, 2)
            redeployed = Plan.parse({"revision": 2, "pools": {"tail": {"nut": {"threshold": 0.2}}}})
            await controller.plan(redeployed)
            while (about := await inspector.describe("nut")).version != 2:
                await asyncio.sleep(0.02)
            assert (about.threshold, about.threshold_source) == (0.41, "operator")
            following.cancel()

        async with operating(registry, tmp_path / "two", plan=redeployed) as (again, client):
            assert (await client.get(THRESHOLD)).json() == said
            status = (await again.status()).categories["nut"]
            assert status.threshold_source == "operator"
            details = ServeInstanceDetails.get_empty_schema_dict()
            lines = describe_status(
                ServeInstanceDetails.model_validate(details), await again.status()
            )
            assert "threshold by an operator" in lines[-1]
            because = {"reason": "the lens is clean"}
            back = (await client.request("DELETE", THRESHOLD, json=because)).json()
            assert (back["source"], back["threshold"]) == ("fleet file", 0.2)
            assert (back["reason"], back["by"]) == ("the lens is clean", "without a token")
            order = (await again.follow("tail", "r", ReplicaReport(), wait_s=0)).categories["nut"]
            assert (order.decision.threshold, order.by_operator) == (0.2, False)

    asyncio.run(run())


def test_a_decision_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    registry = stocked()

    async def run() -> None:
        async with operating(registry, tmp_path) as (controller, client):
            body = {"threshold": 0.41, "reason": "dust on the lens"}
            assert (await client.put(THRESHOLD, json=body)).status_code == 200
            registry.is_away = True
            away = await client.put(THRESHOLD, json=body | {"threshold": 0.5})
            assert (
                "once the registry is back" in problem(away, 503, "no registry answers")["remedy"]
            )
            assert int(away.headers["retry-after"]) > 0
            assert (await client.get(THRESHOLD)).json()["threshold"] == 0.41
        # What was decided is in the cache, too.
        async with operating(registry, tmp_path) as (controller, client):
            assert (await client.get(THRESHOLD)).json()["source"] == "operator"
            order = (await controller.follow("tail", "r", ReplicaReport(), wait_s=0)).categories
            assert order["nut"].decision.threshold == 0.41

    asyncio.run(run())


def test_only_operators_with_a_reason_decide_on_categories_of_the_fleet(tmp_path: Path) -> None:
    async def run() -> None:
        async with operating(stocked(), tmp_path, auth=AUTH) as (_, client):
            body = {"threshold": 0.41, "reason": "dust on the lens"}
            for name, status in (("all", 403), ("one", 403), ("nobody", 401)):
                client.headers["Authorization"] = f"Bearer {name}"
                problem(await client.get(THRESHOLD), status)
                problem(await client.put(THRESHOLD, json=body), status)
                problem(await client.request("DELETE", THRESHOLD, json=body), status)
            client.headers["Authorization"] = "Bearer boss"
            for wrong in (
                {"reason": "no"},
                {"reason": "     "},
                {"reason": "two\nlines"},
                {"reason": "x" * 501},
                {"threshold": 1.1},
                {"threshold": None},
            ):
                problem(await client.put(THRESHOLD, json=body | wrong), 422)
            unknown = THRESHOLD.replace("nut", "screw")
            assert "nut" in problem(await client.put(unknown, json=body), 404, "screw")["remedy"]
            assert (await client.get(THRESHOLD)).json()["source"] == "prompt set"

    asyncio.run(run())
