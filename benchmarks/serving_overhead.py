"""Latency that serving adds: `python -m benchmarks.serving_overhead [--json FILE]`.

`POST inspect` at concurrency 1 and the bare detector take turns on the same bytes with the same
number of threads, so that whatever else the machine does hits both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.fleet import Client, bare, echo, fleet, prepare
from benchmarks.rows import compared, write_rows


def main() -> None:
    """Measure each proxy and print the medians."""
    parser = argparse.ArgumentParser(description="Latency that serving adds.")
    parser.add_argument("--backbone", default="builtin", help="or an architecture, e.g. ViT-B-16")
    parser.add_argument("--proxies", nargs="+", default=["haproxy", "default"])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, data = prepare(folder, options.backbone)
        model = bare(prompt_set, options.threads)
        with echo() as url:
            client = Client(url)
            own = [_ms(partial(client.inspect, data)) for _ in range(options.requests)]
        for proxy in options.proxies:
            with fleet(
                folder, prompt_set, haproxy=proxy == "haproxy", threads=options.threads
            ) as running:
                client = Client(running.url)
                for _ in range(5):
                    client.inspect(data)
                    model.inspect([data])
                pairs = [
                    (_ms(partial(model.inspect, [data])), _ms(partial(client.inspect, data)))
                    for _ in range(options.requests)
                ]
            bare_ms, served_ms = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append(compared(f"{options.backbone}, {proxy}", served_ms, bare_ms, "ms"))
    print(
        f"median of {options.requests}, {options.threads} threads; baseline: the bare detector; the"
        f" client itself takes {statistics.median(own):.1f} ms\n"
    )
    write_rows(rows, options.json)


def _ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
