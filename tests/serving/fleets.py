"""A real fleet for tests: cluster, registry and HTTP, used through the commands alone; and load."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request

import httpx
import psutil
from mlflow import MlflowClient

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import LocalStack, command_environment, fetch
from apt_ray.registry import Registry, open_registry
from tests.processes import processes_below


def ray_workers(stack: LocalStack, title: str) -> list[psutil.Process]:
    """The processes of a stack's Ray whose command line contains `title`."""
    (ray,) = (server for server in stack.servers if server.name == "Ray")
    return processes_below(ray.pid, title)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A fleet under test."""

    stack: LocalStack
    port: int
    folder: Path
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of every deploy

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def registry(self) -> Registry:
        return open_registry(self.tracking_uri)

    @property
    def tracking_uri(self) -> str:
        return self.stack.environment["MLFLOW_TRACKING_URI"]

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "serving.fleet", *arguments],
            cwd=self.folder,  # not the repository: nothing may depend on where it runs
            env=command_environment() | self.stack.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def deploy(
        self, fleet: Mapping[str, object], *, poll_s: float = 1
    ) -> "subprocess.CompletedProcess[str]":
        path = self.folder / "fleet.yaml"
        registry = {"poll_s": poll_s, "cache": str(self.folder / "cache")}
        folders = {"registry": registry, "searches": {"folder": str(self.folder / "searches")}}
        path.write_text(json.dumps(folders | dict(self.settings) | dict(fleet)))
        return self.run("deploy", str(path), "--http-port", str(self.port))

    def replicas(self) -> dict[str, list[int]]:
        """Application -> processes of its replicas, as far as they have started."""
        return {
            name: sorted(replica["pid"] for replica in deployment["replicas"] if "pid" in replica)
            for name, application in self.details()["applications"].items()
            for deployment in application["deployments"].values()
        }

    def details(self) -> dict[str, Any]:
        """All that Ray's dashboard says of Serve."""
        token = Path(self.stack.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = Request(
            f"{self.stack.environment['RAY_API_SERVER_ADDRESS']}/api/serve/applications/",
            headers={"Authorization": f"Bearer {token}"},
        )
        details: dict[str, Any] = json.loads(fetch(request))
        return details

    def get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(fetch(Request(f"{self.url}{path}")))
        return answer

    def inspect(self, category: str, data: bytes, *, query: str = "") -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            fetch(Request(f"{self.url}/v1/{category}/inspect{query}", data=data))
        )
        return answer

    def register(self, prompt_set: PromptSet, *categories: str, champion: bool = False) -> None:
        """A new version of each category, made the champion if it is not the first and asked to."""
        for name in categories:
            named = prompt_set.with_category(name)
            registered = self.registry.register(named, pictures={}, trials=[])
            if champion:
                self.promote(name, registered.version)

    def promote(self, category: str, version: int) -> None:
        """Move the alias, as whoever browses the registry does."""
        MlflowClient(self.tracking_uri).set_registered_model_alias(
            f"apt-{category}", "champion", str(version)
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request under load: when it was sent, and what came back; status 0 if nothing did."""

    at: float
    category: str
    status: int
    version: int
    attempts: int
    detail: str


class Load:
    """Sends images at a steady rate, whatever comes back, while the block runs.

    A request without an answer of 200 is tried once more, `retry_after_s` later.
    """

    def __init__(
        self,
        url: str,
        categories: Sequence[str],
        data: bytes,
        *,
        per_second: float = 20,
        retry_after_s: float = 0.5,
    ) -> None:
        self._url = url
        self._categories = categories
        self._data = data
        self._interval = 1 / per_second
        self._retry_after_s = retry_after_s
        self._client = httpx.Client(trust_env=False, timeout=60)
        self._senders = ThreadPoolExecutor(32)
        self._stopping = threading.Event()
        self._clock = threading.Thread(target=self._tick)
        self.answers: list[Answer] = []

    def __enter__(self) -> "Load":
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._clock.join()
        self._senders.shutdown()
        self._client.close()

    def failed(self, *, attempts: int = 1) -> list[Answer]:
        """What was not answered well within so many attempts."""
        return [a for a in self.answers if a.status != 200 or a.attempts > attempts]

    def wait_for(self, category: str, version: int, *, timeout_s: float = 30) -> float:
        """Seconds until this version first answers."""
        started = time.time()
        while time.time() - started < timeout_s:
            for answer in list(self.answers):
                mine = answer.category == category and answer.version == version
                if mine and answer.at >= started:
                    return answer.at - started
            time.sleep(0.05)
        raise AssertionError(f"{category} does not answer by version {version}")

    def _tick(self) -> None:
        due = time.monotonic()
        turn = 0
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += self._interval
            self._senders.submit(self._send, self._categories[turn % len(self._categories)])
            turn += 1

    def _send(self, category: str) -> None:
        at = time.time()
        status, version, detail = self._ask(category)
        attempts = 1
        if status != 200:
            first = detail
            time.sleep(self._retry_after_s)
            status, version, detail = self._ask(category)
            attempts, detail = 2, f"{first} | {detail}"
        self.answers.append(Answer(at, category, status, version, attempts, detail))

    def _ask(self, category: str) -> tuple[int, int, str]:
        try:
            response = self._client.post(f"{self._url}/v1/{category}/inspect", content=self._data)
        except httpx.HTTPError as error:
            return 0, 0, repr(error)
        version = response.json()["version"] if response.status_code == 200 else 0
        return response.status_code, version, f"{response.status_code} {response.text[:200]}"
