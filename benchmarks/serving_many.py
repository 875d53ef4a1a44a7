"""Many categories in one pool: `python -m benchmarks.serving_many [--json FILE]`.

The engine of a replica, in this process: images of random categories against images of one, the
memory that a further category takes, and the time to add one. Both sides take turns.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import ImageLimits
from benchmarks.fleet import prepare
from benchmarks.rows import compared, write_rows
from serving.api.messages import InspectionRequest
from serving.controller.orders import Order, StoredVersion
from serving.replica.inspector import Inspector
from serving.settings import Batching


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Many categories in one pool.")
    parser.add_argument("--categories", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--images", type=int, default=64, help="of one round and side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        prompt_set, data = prepare(Path(name), "builtin")
    batching = Batching(max_wait_s=600, threads=1)
    pool = Inspector(limits=ImageLimits(), batching=batching, shared=True)
    started = time.perf_counter()
    _add(pool, prompt_set, 0)
    first = time.perf_counter() - started
    asyncio.run(_rate(pool, data, ["part-0"] * 16))
    resident, adding = _resident_mb(), []
    for number in range(1, options.categories):
        started = time.perf_counter()
        _add(pool, prompt_set, number)
        adding.append(time.perf_counter() - started)
    further = (_resident_mb() - resident) / (options.categories - 1)

    g = random.Random(0)
    one, many = [], []
    for _ in range(options.rounds):
        names = [f"part-{g.randrange(options.categories)}" for _ in range(options.images)]
        many.append(asyncio.run(_rate(pool, data, names)))
        one.append(asyncio.run(_rate(pool, data, ["part-0"] * options.images)))
    rows = [
        compared(
            f"{options.categories} categories against one",
            statistics.mean(many),
            statistics.mean(one),
            "images/s",
            more_is_better=True,
        ),
        compared("memory of a further category against the 1 MB wanted", further, 1, "MB"),
        compared(
            "adding one against the first, with its backbone", statistics.median(adding), first, "s"
        ),
    ]
    write_rows(rows, options.json)


def _add(pool: Inspector, prompt_set: PromptSet, number: int) -> None:
    name = f"part-{number}"
    data = prompt_set.with_category(name).to_bytes()
    stored = StoredVersion(category=name, version=1, run_id="", data=data)
    pool.load(name, Order(version=1), stored)


async def _rate(pool: Inspector, data: bytes, names: list[str]) -> float:
    started = time.perf_counter()
    asked = [pool.inspect(name, data, InspectionRequest()) for name in names]
    await asyncio.gather(*asked)
    return len(names) / (time.perf_counter() - started)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
