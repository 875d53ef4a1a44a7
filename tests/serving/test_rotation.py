"""The drill of docs/operating.md: a token is replaced while its line inspects, and no request is
lost."""

import threading
import time
from pathlib import Path

import httpx

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from tests.registry.fake import FakeRegistry
from tests.serving.console.fleets import WholeFleet, served, tokens

OLD, NEW = "line-3", "line-3-b"


def test_a_token_is_rotated_under_load(
    prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    inspect = [f"inspect:{category.name}"]
    image = category.test[0].path.read_bytes()
    given, lost, answered = [OLD], [], {OLD: 0, NEW: 0}
    stopping = threading.Event()

    with (
        served(WholeFleet(registry, tmp_path, auth=tokens(**{OLD: inspect}), images=0)) as fleet,
        httpx.Client(base_url=fleet.url, trust_env=False, timeout=60) as client,
    ):

        def ask(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            path = f"/v1/{category.name}/inspect"
            return client.post(path, content=image, headers=headers).status_code

        def line() -> None:
            while not stopping.is_set():
                token = given[-1]
                status = ask(token)
                answered[token] += status == 200
                if status != 200:
                    lost.append((token, status))

        def until(token: str, status: int) -> None:
            deadline = time.monotonic() + 30
            while ask(token) != status:
                assert time.monotonic() < deadline
                time.sleep(0.05)

        worker = threading.Thread(target=line)
        worker.start()
        try:
            assert ask(NEW) == 401
            fleet.allow(tokens(**{OLD: inspect, NEW: inspect}))  # 1. both hold
            until(NEW, 200)
            assert ask(OLD) == 200
            given.append(NEW)  # 2. the line gets the new one
            seen = answered[NEW]
            while answered[NEW] < seen + 3:  # 3. it is in use
                assert worker.is_alive()
                time.sleep(0.05)
            fleet.allow(tokens(**{NEW: inspect}))  # 4. the old one is revoked
            until(OLD, 401)
            seen = answered[NEW]
            while answered[NEW] < seen + 3:
                assert worker.is_alive()
                time.sleep(0.05)
        finally:
            stopping.set()
            worker.join()
    assert lost == []
    assert answered[OLD]
