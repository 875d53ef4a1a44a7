"""The replica's side of the controller: it follows orders, in the background and from its cache."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from apt_ray.errors import AptError, FleetError, PromptSetError
from serving.api.access import Access
from serving.controller.cache import Cache
from serving.controller.client import ControllerClient
from serving.controller.orders import Order, Orders, ReplicaReport, ServedVersion
from serving.logs import logger
from serving.replica.inspector import Inspector

_LOADERS = 4
# Long enough for the caller of a root that has not heard yet that the category moved.
_GRACE_S = 5.0
_NO_NEWS = "the registry has not said which version to serve"


class Follower:
    """Keeps an inspector at what the controller orders.

    Args:
        pool: whose orders.
        replica: by what name the controller knows it.
        controller: gives them.
        cache: has the last ones.
        inspector, access: carry them out.
        wait_s: how long the controller may hold an answer back.
        again_s: how long to wait for it where there is a cache, and before a second try.
    """

    def __init__(
        self,
        pool: str,
        replica: str,
        controller: ControllerClient,
        *,
        cache: Cache,
        inspector: Inspector,
        access: Access,
        wait_s: float,
        again_s: float = 5.0,
    ) -> None:
        self._again_s = again_s
        self._pool, self._replica = pool, replica
        self._controller = controller
        self._cache = cache
        self._inspector = inspector
        self._access = access
        self._wait_s = wait_s
        self._report = ReplicaReport()
        self._loaders = ThreadPoolExecutor(_LOADERS, "load")
        self._dropping: dict[str, asyncio.TimerHandle] = {}

    @property
    def report(self) -> ReplicaReport:
        """What the replica serves now."""
        return self._report

    async def start(self, *, patience_s: float) -> None:
        """Return once the first orders are carried out, those of the cache if nobody gives any.

        Raises FleetError if there are neither within `patience_s`.
        """
        cached = await asyncio.to_thread(self._cache.recall, self._key, Orders)
        try:
            # The controller may be starting just now; with a cache there is no need to wait for it.
            orders = await self._ask(0.0, patience_s if cached is None else self._again_s)
        except FleetError as error:
            if cached is None:
                raise
            logger.warning("%s: serving from the local cache", error)
            await self._carry_out(cached, followed=False)
        else:
            await self._carry_out(orders, followed=True)

    async def follow_forever(self) -> None:
        """Carry out whatever comes; ends only by being cancelled."""
        while True:
            troubled = any(served.problem for served in self._report.categories.values())
            wait_s = self._again_s if troubled else self._wait_s
            try:
                orders = await self._follow(wait_s)
            except Exception as error:
                logger.warning("the controller does not answer: %s", error)
                self._report = self._report.model_copy(update={"followed": False})
                await asyncio.sleep(1)
                continue
            if orders.etag != self._report.orders or troubled or not self._report.followed:
                await self._carry_out(orders, followed=True)

    async def _follow(self, wait_s: float) -> Orders:
        now = {
            "last_hour": self._inspector.last_hour(),
            "drift": self._inspector.drift(),
            "shadows": self._inspector.shadows(),
        }
        report = self._report.model_copy(update=now)
        return await self._controller.follow(self._pool, self._replica, report, wait_s=wait_s)

    async def _ask(self, wait_s: float, patience_s: float) -> Orders:
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                left = deadline - asyncio.get_running_loop().time()
                call = self._follow(wait_s)
                return await asyncio.wait_for(call, max(left, 0.1))
            except Exception as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise FleetError(
                        f"the fleet's controller does not answer ({error!r}): look at its"
                        " application in Ray's dashboard"
                    ) from error
                await asyncio.sleep(0.2)

    async def _carry_out(self, orders: Orders, *, followed: bool) -> None:
        self._access.allow(orders.auth)
        self._inspector.reset_drift(orders.drift_resets)
        self._inspector.follow_candidates(orders.shadows)
        present = self._inspector.serves()
        wanted: dict[str, Order] = {}
        states: dict[str, ServedVersion] = {}
        for category, order in orders.categories.items():
            serves = present.get(category)
            version = order.version or (serves.version if serves else None)
            wish = order.model_copy(update={"version": version})
            if version is None:
                states[category] = ServedVersion(version=None, problem=_NO_NEWS)
            elif serves == wish:
                states[category] = ServedVersion(version=version, source="registry")
            else:
                wanted[category] = wish
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(_LOADERS)

        async def bring(category: str, order: Order) -> None:
            async with gate:
                states[category] = await self._bring(category, order, followed=followed)

        for category in orders.categories:
            if timer := self._dropping.pop(category, None):
                timer.cancel()
        await asyncio.gather(*(bring(category, order) for category, order in wanted.items()))
        for category in set(self._inspector.serves()) - set(orders.categories):
            if category not in self._dropping:
                self._dropping[category] = loop.call_later(_GRACE_S, self._drop, category)
        thresholds = self._inspector.thresholds()
        self._report = ReplicaReport(
            orders=orders.etag,
            followed=followed,
            categories={
                category: state.model_copy(update={"threshold": thresholds.get(category)})
                for category, state in states.items()
            },
        )
        if followed:
            await asyncio.to_thread(self._cache.remember, self._key, orders)

    async def _bring(self, category: str, order: Order, *, followed: bool) -> ServedVersion:
        """Load a version, from wherever it can be had."""
        assert order.version is not None
        loop = asyncio.get_running_loop()
        source: Literal["registry", "cache"] = "registry"
        stored = await asyncio.to_thread(self._cache.get, category, order.version)
        try:
            if stored is None:
                stored = await self._controller.fetch(category, order.version)
                await asyncio.to_thread(self._cache.put, stored)
            elif not followed:
                source = "cache"
            await loop.run_in_executor(self._loaders, self._inspector.load, category, order, stored)
        except Exception as error:
            if isinstance(error, PromptSetError):
                await asyncio.to_thread(self._cache.forget, category, order.version)
            problem = str(error) if isinstance(error, AptError) else repr(error)
            logger.warning("%s stays as it is: %s", category, problem)
            before = self._report.categories.get(category)
            still = category in self._inspector.serves()
            return ServedVersion(
                version=before.version if before and still else None,
                source=before.source if before and still else None,
                problem=problem,
            )
        return ServedVersion(version=order.version, source=source)

    def _drop(self, category: str) -> None:
        self._dropping.pop(category, None)
        self._inspector.drop(category)

    @property
    def _key(self) -> str:
        return f"orders-{self._pool}"
