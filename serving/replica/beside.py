"""Versions that are wanted beside the one that serves, loaded on demand.

Kept are the last few that somebody asked for, and those that are held.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TypeVar

from apt_ray.errors import AptError, RegistryUnavailableError
from serving.api import problems
from serving.api.messages import Alias
from serving.controller.cache import Cache
from serving.controller.client import ControllerClient
from serving.controller.orders import Order, StoredVersion
from serving.replica.served import ServedCategory

# Those of a few people who compare; a prompt set with its memory is some megabytes.
_KEPT = 4

Answer = TypeVar("Answer")
_Key = tuple[str, Order]

Prepare = Callable[[str, Order, StoredVersion], ServedCategory]
"""Makes a version ready to inspect; blocks, and raises an AptError if that cannot be done."""


class Beside:
    """Candidates, and champions where another version serves.

    Args:
        controller: knows the aliases and has the versions.
        cache: has some of them. Nothing is put there: what is tried must not push out what serves.
    """

    def __init__(self, controller: ControllerClient, cache: Cache) -> None:
        self._controller = controller
        self._cache = cache
        self._loading: OrderedDict[_Key, asyncio.Task[ServedCategory]] = OrderedDict()
        self._held: set[_Key] = set()

    async def find(self, alias: Alias, serves: ServedCategory, prepare: Prepare) -> ServedCategory:
        """The version behind an alias, as it would serve: decided as the one that does.

        Raises ProblemError if there is none, if nobody can be asked, or if it cannot be served.
        """
        category = serves.about.category
        try:
            version = await self._ask(self._controller.resolve(category, alias))
            if version is None:
                raise problems.no_version(category, alias)
            order = serves.order.model_copy(update={"version": version})
            return serves if order == serves.order else await self.get(category, order, prepare)
        except RegistryUnavailableError as error:
            raise problems.not_ready(f"the {alias} of {category}", reason=str(error)) from None
        except AptError as error:
            raise problems.unusable(category, alias, str(error)) from None

    def hold(self, versions: Collection[tuple[str, Order]]) -> None:
        """Keep these versions of categories, and no others that were held before."""
        self._held = set(versions)
        self._forget_oldest()

    async def get(self, category: str, order: Order, prepare: Prepare) -> ServedCategory:
        """A version, ready to inspect. Raises AptError or ProblemError."""
        key = (category, order)
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(category, order, prepare))
            self._loading[key].add_done_callback(partial(self._forget_failed, key))
        self._loading.move_to_end(key)
        self._forget_oldest()
        # Others may wait for it, too: a caller who goes away ends nothing.
        return await asyncio.shield(self._loading[key])

    def _forget_oldest(self) -> None:
        others = [key for key in self._loading if key not in self._held]
        for key in others[:-_KEPT]:
            del self._loading[key]

    def _forget_failed(self, key: _Key, loading: asyncio.Task[ServedCategory]) -> None:
        """So that the next one tries again."""
        failed = loading.cancelled() or loading.exception() is not None
        if failed and self._loading.get(key) is loading:
            del self._loading[key]

    async def stored(self, category: str, version: int) -> StoredVersion:
        """The file of a version. Raises AptError or ProblemError if nobody has it."""
        stored = await asyncio.to_thread(self._cache.get, category, version)
        if stored is None:
            stored = await self._ask(self._controller.fetch(category, version))
        return stored

    async def _load(self, category: str, order: Order, prepare: Prepare) -> ServedCategory:
        assert order.version is not None
        stored = await self.stored(category, order.version)
        return await asyncio.to_thread(prepare, category, order, stored)

    async def _ask(self, question: Awaitable[Answer]) -> Answer:
        """What the controller answers; whatever is no AptError means that it does not."""
        try:
            return await question
        except AptError:
            raise
        except Exception as error:
            raise problems.not_ready("the fleet's controller", reason=str(error)) from None
