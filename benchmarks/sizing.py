"""Is the model of `apt-ray plan` right? `python -m benchmarks.sizing [--load] [--json FILE]`.

First a discrete-event simulation of a pool, with the times that a detector took for images here,
one after another: arrivals at random (Poisson), each to the one of two random replicas that has
fewer requests, as Ray Serve sends them. With `--load` a real fleet of one replica is asked at three
rates as well. The baseline of each row is the model, 15 % are allowed.
"""

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from apt_ray.sizing import FleetDemand, Speeds, mean_time, plan_fleet
from benchmarks.fleet import BareModel, Client, bare, fleet, prepare
from benchmarks.rows import Row, compared, write_rows

_REPLICAS = (1, 2, 4, 8, 32)
_BUSY = (0.3, 0.5, 0.7)
_ARRIVALS = 40_000
_RECORDED = 60
_SENDERS = 64


def main() -> None:
    """Simulate, load, and print both beside the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", action="store_true", help="ask a real fleet, too")
    parser.add_argument("--seconds", type=float, default=40, help="of each rate")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, data = prepare(folder, "builtin")
        torch.set_num_threads(1)
        taken_s = _recorded(bare(prompt_set, 1), data)
        mean_s = statistics.fmean(taken_s)
        variation = statistics.variance(taken_s) / mean_s**2
        print(f"service: {1000 * mean_s:.1f} ms, squared coefficient of variation {variation:.3f}")
        for replicas in _REPLICAS:
            for busy in _BUSY:
                simulated = simulate(replicas, busy, taken_s, arrivals=_ARRIVALS, seed=0)
                title = f"simulated, {replicas} replicas busy {busy:.0%}: mean latency"
                model_s = mean_s * mean_time(replicas, busy, variation)
                rows.append(compared(title, 1000 * simulated, 1000 * model_s, "ms"))
        if options.load:
            with fleet(folder, prompt_set, haproxy=True, threads=1) as running:
                # Client and proxy share the core with the replica, which is slower beside them.
                alone_s = statistics.fmean(_one_by_one(running.url, data)) - Speeds().request_s
                speeds = Speeds(image_s=alone_s, decode_s=0.0, variation=variation)
                for busy in _BUSY:
                    rate = busy / alone_s
                    plan = plan_fleet(FleetDemand(categories=1, rps=rate), speeds)
                    found_s = _load(running.url, data, rate, options.seconds)
                    title = f"loaded, 1 replica, {rate:.1f} images/s: mean latency"
                    rows.append(compared(title, 1000 * found_s, 1000 * plan.latency_s, "ms"))
    write_rows(rows, options.json)


def simulate(
    replicas: int, busy: float, taken_s: Sequence[float], *, arrivals: int, seed: int
) -> float:
    """Mean seconds of a request in a simulated pool, from its arrival to its end.

    Args:
        replicas: of the pool; each does one image at a time, in order.
        busy: which share of their time they shall work.
        taken_s: recorded service times, drawn from at random.
        arrivals: how many requests; the first tenth, which finds the pool empty, does not count.
        seed: of the random numbers.
    """
    g = random.Random(seed)
    rate = busy * replicas / statistics.fmean(taken_s)
    now = 0.0
    ends: list[deque[float]] = [deque() for _ in range(replicas)]
    total, counted = 0.0, 0
    for number in range(arrivals):
        now += g.expovariate(rate)
        asked = g.sample(ends, min(2, replicas))
        for queue in asked:
            while queue and queue[0] <= now:
                queue.popleft()
        queue = min(asked, key=len)
        end = (queue[-1] if queue else now) + g.choice(taken_s)
        queue.append(end)
        if number >= arrivals // 10:
            total += end - now
            counted += 1
    return total / counted


def _recorded(model: BareModel, data: bytes) -> list[float]:
    model.inspect([data])
    taken = []
    for _ in range(_RECORDED):
        started = time.perf_counter()
        model.inspect([data])
        taken.append(time.perf_counter() - started)
    return taken


def _one_by_one(url: str, data: bytes) -> list[float]:
    client = Client(url)
    taken = []
    for _ in range(_RECORDED):
        started = time.perf_counter()
        client.inspect(data)
        taken.append(time.perf_counter() - started)
    return taken[5:]  # the first ones warm up


def _load(url: str, data: bytes, rate: float, seconds: float) -> float:
    """Mean seconds of requests that come at random times."""
    own = threading.local()
    taken: list[float] = []

    def send() -> None:
        if not hasattr(own, "client"):
            own.client = Client(url)
            own.client.inspect(data)
        started = time.perf_counter()
        if own.client.inspect(data) == 200:
            taken.append(time.perf_counter() - started)

    g = random.Random(0)
    due = time.perf_counter()
    end = due + seconds
    with ThreadPoolExecutor(_SENDERS) as senders:
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            senders.submit(send)
            due += g.expovariate(rate)
    return statistics.fmean(taken)


if __name__ == "__main__":
    main()
