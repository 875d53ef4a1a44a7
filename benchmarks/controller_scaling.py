"""What a fleet's controller takes of many categories: `python -m benchmarks.controller_scaling`.

A registry that answers at once, pools of a thousand categories each: what the controller itself
computes, holds and sends. The registry's own part is `benchmarks.registry_poll`, a replica's memory
`benchmarks.serving_many`. The baseline of each row is the interval of 10 s between two questions,
or 1 GB.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from apt_ray.registry import CHAMPION, RegisteredCategory
from benchmarks.rows import Row, compared, write_rows
from serving.controller.cache import Cache
from serving.controller.controller import Controller
from serving.controller.orders import Plan, ReplicaReport
from serving.settings import CategoryEntry

_OF_POOL = 1000
_INTERVAL_S = 10.0
_GB = 1e9


def main() -> None:
    """Print seconds and bytes for each number of categories."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--categories", type=int, nargs="+", default=[10, 1000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[Row] = []
    for number in options.categories:
        rows += asyncio.run(_measure(number))
    write_rows(rows, options.json)


async def _measure(number: int) -> list[Row]:
    names = [f"product-{each:06}" for each in range(number)]
    found = {name: RegisteredCategory(aliases={CHAMPION: 1}, threshold=None) for name in names}
    registry: Any = SimpleNamespace(categories=lambda: dict(found))
    process = psutil.Process()
    before = process.memory_info().rss
    rows: list[Row] = []

    async def timed(what: str, work: Callable[[], Awaitable[Any]]) -> Any:
        started = time.perf_counter()
        result = await work()
        seconds = time.perf_counter() - started
        rows.append(compared(f"{number:,} categories: {what}", seconds, _INTERVAL_S, "s"))
        return result

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as folder:
        controller = Controller(lambda: registry, Cache(folder, "memory"), poll_s=60)
        pools = {
            f"pool-{start // _OF_POOL}": {
                name: CategoryEntry() for name in names[start : start + _OF_POOL]
            }
            for start in range(0, number, _OF_POOL)
        }
        await timed("a deploy reaches the controller", lambda: controller.plan(Plan(pools=pools)))
        await timed("the first answer of the registry", controller.poll)
        await timed("an answer without news", controller.poll)
        polling = asyncio.create_task(controller.poll_forever())
        await controller.routes("")
        await timed(
            "orders of one pool", lambda: controller.follow("pool-0", "replica", ReplicaReport())
        )
        routes = await timed("routes of the root", lambda: controller.routes(""))
        status = await timed("the status", controller.status)
        polling.cancel()
        for what, sent in (("routes", routes), ("status", status)):
            size = len(sent.model_dump_json())
            rows.append(compared(f"{number:,} categories: {what} as JSON", size, _GB, "B"))
        grown = process.memory_info().rss - before
        rows.append(compared(f"{number:,} categories: memory", grown, _GB, "B"))
    return rows


if __name__ == "__main__":
    main()
