"""The root's side of the pools: it hands images to them by handle, and knows who has what."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from apt_ray.errors import FleetError, ImageError
from serving.api import problems
from serving.api.access import Access
from serving.api.history import (
    NO_HISTORY,
    HistoryService,
    KeptInspection,
    KeptInspections,
    KeptPicture,
    Mark,
    Only,
    Picked,
    Wanted,
)
from serving.api.messages import (
    CategoryReport,
    Explanation,
    Inspected,
    InspectionRequest,
    Service,
)
from serving.api.problems import Problem, ProblemError
from serving.controller.cache import Cache
from serving.controller.client import ControllerClient
from serving.controller.orders import Routes
from serving.logs import logger

_WITH_CACHE_S = 5.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A problem on its way from a replica to the root."""

    problem: Problem
    headers: dict[str, str] | None


class PoolHandle(Protocol):
    """A pool as the root reaches it."""

    async def inspect(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Inspected | Refusal: ...

    async def explain(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Explanation | Refusal: ...

    async def describe(self, category: str) -> CategoryReport | Refusal: ...

    async def history(
        self, category: str, before: int | None, limit: int, only: Only
    ) -> KeptInspections | Refusal: ...

    async def history_picture(
        self, category: str, number: int, picture: KeptPicture
    ) -> bytes | Refusal: ...

    async def mark(
        self, category: str, number: int, mark: Mark, by: str
    ) -> KeptInspection | Refusal: ...

    async def pick(self, category: str, wanted: Wanted) -> list[Picked] | Refusal: ...


class Pools:
    """Answers for every category of the fleet, by the pool that has it.

    Args:
        handle: gives the handle of a pool.
        access: gets the tokens that come with the routes.
        cache: has the last routes; None to keep none.
    """

    def __init__(
        self,
        handle: Callable[[str], PoolHandle],
        access: Access,
        cache: Cache | None = None,
    ) -> None:
        self._cache = cache
        self._handle = lru_cache(maxsize=None)(handle)
        self._access = access
        self._routes = Routes()

    @property
    def categories(self) -> list[str]:
        return sorted(self._routes.pools)

    def follow(self, routes: Routes) -> None:
        """Hand on by these routes from now on."""
        self._access.allow(routes.auth)
        self._routes = routes

    async def start(self, controller: ControllerClient, *, patience_s: float) -> None:
        """Return once there are routes, those of the cache if the controller gives none.

        Raises FleetError if there are neither within `patience_s`.
        """
        cached: Routes | None = None
        if self._cache is not None:
            cached = await asyncio.to_thread(self._cache.recall, "routes", Routes)
        deadline = time.monotonic() + (_WITH_CACHE_S if cached else patience_s)
        while (left := deadline - time.monotonic()) > 0:
            try:
                await self._learn(await asyncio.wait_for(controller.routes(""), left))
                return
            except Exception as error:
                logger.warning("the controller does not answer: %r", error)
                await asyncio.sleep(0.2)
        if not cached:
            raise FleetError(
                "the fleet's controller does not answer: look at its application in Ray's dashboard"
            )
        self.follow(cached)

    async def _learn(self, routes: Routes) -> None:
        changed = routes != self._routes
        self.follow(routes)
        if self._cache and changed:
            await asyncio.to_thread(self._cache.remember, "routes", routes)

    async def follow_forever(self, controller: ControllerClient) -> None:
        """Keep the routes at what the controller says; ends only by being cancelled."""
        while True:
            try:
                await self._learn(await controller.routes(self._routes.etag))
            except Exception as error:
                logger.warning("the controller does not answer: %s", error)
                await asyncio.sleep(1)

    async def describe(self, category: str) -> CategoryReport:
        return await self._ask(category, lambda pool: pool.describe(category))

    async def inspect(self, category: str, data: bytes, asked: InspectionRequest) -> Inspected:
        return await self._ask(category, lambda pool: pool.inspect(category, data, asked))

    async def explain(self, category: str, data: bytes, asked: InspectionRequest) -> Explanation:
        return await self._ask(category, lambda pool: pool.explain(category, data, asked))

    async def history(
        self, category: str, *, before: int | None, limit: int, only: Only
    ) -> KeptInspections:
        return await self._ask(category, lambda pool: pool.history(category, before, limit, only))

    async def history_picture(self, category: str, number: int, picture: KeptPicture) -> bytes:
        return await self._ask(
            category, lambda pool: pool.history_picture(category, number, picture)
        )

    async def mark(self, category: str, number: int, mark: Mark, by: str) -> KeptInspection:
        return await self._ask(category, lambda pool: pool.mark(category, number, mark, by))

    async def pick(self, category: str, wanted: Wanted) -> list[Picked]:
        return await self._ask(category, lambda pool: pool.pick(category, wanted))

    async def _ask(
        self, category: str, question: Callable[[PoolHandle], Awaitable[Answer | Refusal]]
    ) -> Answer:
        """What a pool answers; one whose replica dies meanwhile is asked again."""
        pools = self._routes.pools.get(category)
        if not pools:
            raise problems.unknown_category(category, self._routes.pools)
        try:
            try:
                answer = await question(self._handle(pools[0]))
            except RayActorError:
                answer = await question(self._handle(pools[0]))
        except BackPressureError:
            raise problems.overloaded(f"the pool of {category} has a full queue") from None
        except RayActorError:
            raise problems.not_ready(category, reason="its replica has ended") from None
        except (DeploymentUnavailableError, RayServeException) as error:
            raise problems.not_ready(category, reason=str(error)) from None
        if isinstance(answer, Refusal):
            raise ProblemError.of(answer.problem, answer.headers)
        return answer


class Answering:
    """A service and a history for others to reach by handle: problems are values, which travel
    well."""

    def __init__(self, service: Service, history: HistoryService = NO_HISTORY) -> None:
        self._service = service
        self._history = history

    async def inspect(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Inspected | Refusal:
        try:
            return await self._service.inspect(category, data, asked)
        except ImageError as error:
            return _refusal(problems.of_image(error))
        except ProblemError as error:
            return _refusal(error)

    async def explain(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Explanation | Refusal:
        try:
            return await self._service.explain(category, data, asked)
        except ImageError as error:
            return _refusal(problems.of_image(error))
        except ProblemError as error:
            return _refusal(error)

    async def describe(self, category: str) -> CategoryReport | Refusal:
        try:
            return await self._service.describe(category)
        except ProblemError as error:
            return _refusal(error)

    async def history(
        self, category: str, before: int | None, limit: int, only: Only
    ) -> KeptInspections | Refusal:
        try:
            return await self._history.history(category, before=before, limit=limit, only=only)
        except ProblemError as error:
            return _refusal(error)

    async def history_picture(
        self, category: str, number: int, picture: KeptPicture
    ) -> bytes | Refusal:
        try:
            return await self._history.history_picture(category, number, picture)
        except ProblemError as error:
            return _refusal(error)

    async def mark(
        self, category: str, number: int, mark: Mark, by: str
    ) -> KeptInspection | Refusal:
        try:
            return await self._history.mark(category, number, mark, by)
        except ProblemError as error:
            return _refusal(error)

    async def pick(self, category: str, wanted: Wanted) -> list[Picked] | Refusal:
        try:
            return await self._history.pick(category, wanted)
        except ProblemError as error:
            return _refusal(error)


def _refusal(error: ProblemError) -> Refusal:
    return Refusal(problem=error.problem, headers=error.headers)
