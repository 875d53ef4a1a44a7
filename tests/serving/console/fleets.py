"""Fleets in this process for the tests of the console: the real routes, without Ray."""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from ray.serve.exceptions import RayServeException

from apt_ray.devtools.local_stack import HOST, free_ports
from serving.api.access import Access
from serving.api.pools import Answering, Pools
from serving.api.root import create_root_api
from serving.controller.orders import CategoryStatus, FleetStatus, Routes
from serving.replica.inspector import Inspector
from serving.settings import Auth, HttpLimits

LIMITS = HttpLimits()


def tokens(**scopes: Sequence[str]) -> Auth:
    """Tokens that are called what they are: `tokens(line=["inspect"])`."""
    return Auth.parse(
        {
            "tokens": [
                {
                    "name": name,
                    "sha256": hashlib.sha256(name.encode()).hexdigest(),
                    "scopes": list(some),
                }
                for name, some in scopes.items()
            ]
        }
    )


class MemoryController:
    """A controller that knows what it is told."""

    def __init__(self, categories: dict[str, CategoryStatus]) -> None:
        self.categories = categories
        self.registry = "ok"
        self.is_away = False

    async def routes(self, known: str) -> Routes:
        raise NotImplementedError

    async def status(self) -> FleetStatus:
        if self.is_away:
            raise RayServeException("the controller has ended")
        return FleetStatus(
            revision=1,
            deployed_by="me@here",
            registry=self.registry,
            polled_s_ago=1.0,
            categories=self.categories,
        )

    async def audit_lines(self) -> list[dict[str, object]]:
        return []

    async def wake(self, reason: str) -> None:
        raise NotImplementedError


class ConsoleFleet:
    """A fleet of one pool whose every part can be reached by a test."""

    def __init__(
        self,
        inspector: Inspector,
        controller: MemoryController,
        *,
        auth: Auth | None = None,
        http: HttpLimits = LIMITS,
    ) -> None:
        self.controller = controller
        self._access = Access(Auth())
        self._pools = Pools(lambda pool: Answering(inspector), self._access)
        self.allow(auth or Auth())
        self.api: FastAPI = create_root_api(
            self._pools, controller, http=http, access=self._access, webhook_secret=""
        )
        self.url = ""

    def allow(self, auth: Auth) -> None:
        """These tokens and no others from now on."""
        pools = dict.fromkeys(self.controller.categories, ("tail",))
        self._pools.follow(Routes(pools=pools, auth=auth))


@contextmanager
def served(fleet: ConsoleFleet, app: Any = None) -> Iterator[ConsoleFleet]:
    """The fleet at a port of this machine, `fleet.url`."""
    (port,) = free_ports(1)
    server = uvicorn.Server(
        uvicorn.Config(app or fleet.api, host=HOST, port=port, log_level="warning", ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    fleet.url = f"http://{HOST}:{port}"
    yield fleet
    server.should_exit = True
    thread.join()


def ready(**more: Any) -> CategoryStatus:
    """A category that answers."""
    told = {
        "state": "READY",
        "pools": ("tail",),
        "wanted": 7,
        "serving": (7,),
        "replicas": 1,
        "from_cache": False,
    }
    return CategoryStatus(**(told | more))


def busy(name: str) -> CategoryStatus:
    """A category that answers, with an hour that its name decides."""
    return ready(wanted=len(name))
