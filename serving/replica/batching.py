"""Batches that form by themselves: whatever waits when the model is free is the next batch.

A lone item runs at once, and under load batches grow, without a set time to wait for others. Ray
Serve's own `@serve.batch` closes its batches by the clock even while the model is busy.

A batch takes one item of each key in turn, so that a flooded key delays the others by its share and
no more. What is only worth idle time runs while nothing waits, one piece at a time: an item that
arrives meanwhile waits for the rest of that piece.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Idle = TypeVar("Idle")


class Batcher(Generic[Item, Result]):
    """Runs a function of a list on items that arrive one by one, one batch at a time.

    Args:
        run: Takes a batch and returns a result for each of its items, in order; an exception among
            the results belongs to its item alone.
        executor: Where it runs.
        max_batch_size: Items of one batch at the most.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result | Exception]],
        *,
        executor: Executor,
        max_batch_size: int,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch_size = max_batch_size
        # Keys in the order of their turns; none is empty.
        self._waiting: dict[str, deque[tuple[Item, asyncio.Future[Result]]]] = {}
        self._for_idle: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, key: str, item: Item) -> Result:
        """The item's result; raises what its batch raised."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append((item, future))
        self._wake()
        return await future

    async def when_idle(self, work: Callable[[], Idle]) -> Idle:
        """What `work` returns or raises; it runs where batches do, once no item waits."""
        future: asyncio.Future[Idle] = asyncio.get_running_loop().create_future()
        self._for_idle.append((work, future))
        self._wake()
        return await future

    def _wake(self) -> None:
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or self._for_idle:
            futures: tuple[asyncio.Future[Any], ...]
            run: Callable[[], list[Any]]
            results: list[Any]
            if batch := self._next_batch():
                items, futures = zip(*batch, strict=True)
                run = partial(self._run, list(items))
            elif self._for_idle:
                work, future = self._for_idle.popleft()
                futures, run = (future,), partial(_alone, work)
            else:
                return  # whoever submitted the last items has gone
            try:
                results = await loop.run_in_executor(self._executor, run)
            except Exception as error:  # it belongs to those who wait for this batch
                results = [error] * len(futures)
            for future, result in zip(futures, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        """The next items whose submitters still wait for them."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            key = next(iter(self._waiting))
            queue = self._waiting.pop(key)
            item, future = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind the others
            if not future.done():
                batch.append((item, future))
        return batch


def _alone(work: Callable[[], Result]) -> list[Result]:
    return [work()]
