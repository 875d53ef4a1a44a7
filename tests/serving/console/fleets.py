"""Fleets in this process for the tests of the console: the real routes, without Ray."""

import asyncio
import hashlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from apt_ray.devtools.local_stack import HOST, free_ports
from apt_ray.errors import RegistryUnavailableError
from apt_ray.registry import Registry
from serving.api.access import Access
from serving.api.history import NO_HISTORY
from serving.api.pools import Answering, Pools
from serving.api.root import create_root_api
from serving.api.searches import Jobs, Searches
from serving.api.training_images import TrainingImages
from serving.api.tuning import Tuning
from serving.controller.activity import SCORE_BINS, Activity, score_bin
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.drift import DriftsCleared, DriftStatus
from serving.controller.moves import VersionSummary
from serving.controller.orders import CategoryStatus, FleetStatus, Plan, Routes
from serving.replica.beside import Beside
from serving.replica.follower import Follower
from serving.replica.history import History
from serving.replica.inspector import Inspector
from serving.settings import (
    Auth,
    Batching,
    CategoryEntry,
    FeedbackSettings,
    HistorySettings,
    HttpLimits,
)
from tests.serving.engines import torch_inspector

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


def tuning_of(jobs: Jobs, folder: Path) -> Tuning:
    """Searches that are jobs of these, and images in a folder."""
    searches = Searches(
        lambda: jobs, folder, tracking_uri="http://registry", dashboard="https://ray.example"
    )
    images = TrainingImages(folder / "images", limits=LIMITS.image, most=200)
    return Tuning(searches=searches, images=images)


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

    async def reset_drift(
        self, category: str, *, anew: bool, reason: str, by: str
    ) -> DriftsCleared:
        drift = self.categories[category].drift
        cleared = tuple(alarm.stream for alarm in drift.alarms) if drift else ()
        changed = {"drift": DriftStatus(learning=0, alarms=())}
        self.categories[category] = self.categories[category].model_copy(update=changed)
        return DriftsCleared(category=category, cleared=cleared, anew=anew)

    async def versions(self, category: str, limit: int) -> list[VersionSummary]:
        raise RegistryUnavailableError("no registry answers at memory: call it back")


class ConsoleFleet:
    """A fleet of one pool whose every part can be reached by a test."""

    def __init__(
        self,
        inspector: Inspector,
        controller: MemoryController,
        *,
        auth: Auth | None = None,
        http: HttpLimits = LIMITS,
        tuning: Tuning | None = None,
    ) -> None:
        self.controller = controller
        self._access = Access(Auth())
        self._pools = Pools(lambda pool: Answering(inspector), self._access)
        self.allow(auth or Auth())
        self.api: FastAPI = create_root_api(
            self._pools,
            controller,
            http=http,
            access=self._access,
            webhook_secret="",
            tuning=tuning,
        )
        self.url = ""

    def allow(self, auth: Auth) -> None:
        """These tokens and no others from now on."""
        pools = dict.fromkeys(self.controller.categories, ("tail",))
        self._pools.follow(Routes(pools=pools, auth=auth))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ASGIApp]:
        yield self.api


class WholeFleet:
    """A fleet with its own controller and replica on a registry: all that Ray would run."""

    def __init__(
        self,
        registry: Registry,
        folder: Path,
        *,
        auth: Auth | None = None,
        images: int = 100,
        jobs: Jobs | None = None,
        categories: Sequence[str] = (),
    ) -> None:
        self.registry = registry
        self._categories = categories
        self._deployed: tuple[asyncio.AbstractEventLoop, Controller, Plan] | None = None
        self.url = ""
        self._folder = folder
        self._auth = auth or Auth()
        self.searches = folder / "searches"
        self._tuning = tuning_of(jobs, self.searches) if jobs else None
        self._kept = HistorySettings(images=images, folder=str(folder / "history"))
        self._feedback = FeedbackSettings(folder=str(folder / "feedback"))

    def allow(self, auth: Auth) -> None:
        """Deploy these tokens and no others, while it runs."""
        assert self._deployed is not None
        loop, controller, plan = self._deployed
        plan = plan.model_copy(update={"revision": plan.revision + 1, "auth": auth})
        asyncio.run_coroutine_threadsafe(controller.plan(plan), loop).result()
        self._deployed = loop, controller, plan

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ASGIApp]:
        cache = Cache(str(self._folder / "cache"), "memory")
        controller = Controller(
            lambda: self.registry,
            cache,
            poll_s=0.5,
            page="https://mlflow.example",
            feedback=self._feedback,
        )
        entries = {name: CategoryEntry() for name in self._categories or self.registry.aliases()}
        plan = Plan(
            revision=1,
            pools={"tail": entries},
            auth=self._auth,
            names_all=True,
            joined="tail",
        )
        await controller.plan(plan)
        self._deployed = asyncio.get_running_loop(), controller, plan
        tasks = [asyncio.create_task(controller.poll_forever())]
        access = Access(Auth())
        history = History(self._kept, "memory") if self._kept.images else None
        inspector = torch_inspector(
            limits=LIMITS.image,
            batching=Batching(threads=2),
            shared=True,
            beside=Beside(controller, cache),
            history=history,
        )
        follower = Follower(
            "tail",
            "replica",
            controller,
            cache=cache,
            inspector=inspector,
            access=access,
            wait_s=0.5,
        )
        await follower.start(patience_s=60)
        tasks.append(asyncio.create_task(follower.follow_forever()))
        answering = Answering(inspector, history or NO_HISTORY)
        pools = Pools(lambda pool: answering, access)
        await pools.start(controller, patience_s=60)
        tasks.append(asyncio.create_task(pools.follow_forever(controller)))
        yield create_root_api(
            pools,
            controller,
            http=LIMITS,
            access=access,
            webhook_secret="",
            tuning=self._tuning,
            feedback=self._feedback.store(),
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Fleet = TypeVar("Fleet", ConsoleFleet, WholeFleet)


@contextmanager
def served(fleet: Fleet, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> Iterator[Fleet]:
    """The fleet at a port of this machine, `fleet.url`."""
    (port,) = free_ports(1)
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        async with fleet.running() as app:
            config = uvicorn.Config(wrap(app), host=HOST, port=port, log_level="warning", ws="none")
            servers.append(uvicorn.Server(config))
            started.set()
            await servers[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not (started.wait(0.01) and servers[0].started):
        assert thread.is_alive()
    fleet.url = f"http://{HOST}:{port}"
    yield fleet
    servers[0].should_exit = True
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


def busy(seed: str) -> CategoryStatus:
    """A category that answers, with an hour that `seed` decides."""
    g = random.Random(seed)
    good, bad = g.randrange(20, 900), g.randrange(0, 30)
    scores = [g.gauss(0.22, 0.05) for _ in range(good)] + [g.gauss(0.6, 0.1) for _ in range(bad)]
    bins = [0] * SCORE_BINS
    for score in scores:
        bins[score_bin(score)] += 1
    return ready(
        threshold=0.4,
        candidate=8 if g.random() < 0.1 else None,
        last_hour=Activity(
            inspected=len(scores),
            rejected=sum(score > 0.4 for score in scores),
            latency_ms_p50=g.uniform(20, 60),
            latency_ms_p95=g.uniform(60, 120),
            scores=tuple(bins),
        ),
    )
