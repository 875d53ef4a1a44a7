"""A fleet that changes under load: no request may fail that a killed process did not hold."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from mlflow import MlflowClient

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import LocalStack, free_ports
from serving.api.webhooks import SECRET_VARIABLE
from tests.serving.fleets import Deployed, Load, ray_workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POOLS = {
    "defaults": {"max_wait_s": 20},
    "pools": {"tail": {"autoscaling": {"min_replicas": 2, "max_replicas": 2}}},
}
ONE = {"autoscaling": {"max_replicas": 1}}
SECRET = "known to MLflow and the fleet"
PER_SECOND = float(os.environ.get("APT_RAY_TEST_RATE", "20"))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, prompt_set: PromptSet) -> Iterator[Deployed]:
    """A category with a pool of its own and one in a shared pool of two replicas."""
    folder = tmp_path_factory.mktemp("changes")
    stack = LocalStack(
        folder / "stack",
        ray_env={SECRET_VARIABLE: SECRET},
        mlflow_env={
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        },
    )
    stack.start()
    try:
        fleet = Deployed(stack=stack, port=free_ports(1)[0], folder=folder)
        fleet.register(prompt_set, "blister", "washer", "screw")
        done = fleet.deploy(POOLS | {"categories": {"blister": ONE, "washer": {"pool": "tail"}}})
        assert done.returncode == 0, done.stderr
        yield fleet
    finally:
        stack.stop()


@pytest.fixture
def picture(category: Category) -> bytes:
    return category.test[0].path.read_bytes()


def _until(holds: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_versions_pools_and_bounds_change_without_a_failed_request(
    deployed: Deployed, prompt_set: PromptSet, picture: bytes
) -> None:
    def deploy(**categories: object) -> None:
        done = deployed.deploy(POOLS | {"categories": categories})
        assert done.returncode == 0, done.stderr

    names = ("blister", "washer")
    before = {name: deployed.inspect(name, picture)["version"] for name in names}
    with Load(deployed.url, names, picture, per_second=PER_SECOND) as load:
        deployed.register(prompt_set, *names, champion=True)
        newest = {name: deployed.registry.versions(name)[0] for name in names}
        followed = [load.wait_for(name, newest[name]) for name in names]
        for name in names:
            deployed.promote(name, before[name])
        rolled_back = [load.wait_for(name, before[name]) for name in names]
        tail = {"pool": "tail"}
        deploy(blister=ONE, washer=tail, screw=tail)
        deploy(blister={"autoscaling": {"max_replicas": 2}}, washer=tail)
        deploy(blister=tail, washer=tail)
        deploy(blister=tail, washer=ONE)
        time.sleep(1)
    print(
        f"\n{len(load.answers)} requests, {len(load.failed())} failed; followed after {followed},"
        f" rolled back after {rolled_back} s"
    )
    assert load.failed() == []
    assert len(load.answers) > 50
    for name in names:
        answered = {answer.version for answer in load.answers if answer.category == name}
        assert answered == {before[name], newest[name]}
    assert max(*followed, *rolled_back) < 15


def test_killed_processes_take_only_what_they_held(deployed: Deployed, picture: bytes) -> None:
    two = {"autoscaling": {"min_replicas": 2, "max_replicas": 2}}
    done = deployed.deploy(POOLS | {"categories": {"blister": {"pool": "tail"}, "washer": two}})
    assert done.returncode == 0, done.stderr

    def processes(of: str) -> list[int]:
        if of == "proxy":
            return [process.pid for process in ray_workers(deployed.stack, "ray::HAProxyManager")]
        return deployed.replicas()[of]

    rate = PER_SECOND / 2
    for killed, most_failed, retry_after_s in (
        ("pool-tail", 8, 0.5),
        ("pool-washer", 8, 0.5),
        ("controller", 0, 0.5),
        # The only one of the only node: nobody listens until Serve has started it again.
        ("proxy", 15 * rate, 12),
    ):
        before = processes(killed)
        with Load(
            deployed.url,
            ("blister", "washer"),
            picture,
            per_second=rate,
            retry_after_s=retry_after_s,
        ) as load:
            time.sleep(1)
            os.kill(before[0], signal.SIGKILL)

            def again(killed: str = killed, before: list[int] = before) -> bool:
                now = processes(killed)
                return len(now) == len(before) and before[0] not in now

            _until(again)
            time.sleep(2)
        once, twice = load.failed(), load.failed(attempts=2)
        print(
            f"\n{killed}: {len(load.answers)} requests, {len(once)} failed,"
            f" {len(twice)} after one retry"
        )
        assert twice == []
        assert len(once) <= most_failed


def test_a_webhook_spares_the_wait_for_the_next_poll(
    deployed: Deployed, prompt_set: PromptSet, picture: bytes
) -> None:
    tail = {"pool": "tail"}
    fleet = POOLS | {"categories": {"blister": tail, "washer": tail}}
    done = deployed.deploy(fleet, poll_s=600)
    assert done.returncode == 0, done.stderr
    events = ["model_version_alias.created", "model_version_alias.deleted"]
    MlflowClient(deployed.tracking_uri).create_webhook(
        "fleet", f"{deployed.url}/webhooks/mlflow", events, secret=SECRET
    )
    deployed.register(prompt_set, "washer")
    newest = deployed.registry.versions("washer")[0]
    assert deployed.inspect("washer", picture)["version"] != newest
    with Load(deployed.url, ["washer"], picture, per_second=4) as load:
        deployed.promote("washer", newest)
        followed = load.wait_for("washer", newest, timeout_s=60)
    print(f"\nfollowed a webhook after {followed:.1f} s")
    assert followed < 3
    assert load.failed() == []
