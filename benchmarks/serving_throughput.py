"""Images a second through the fleet: `python -m benchmarks.serving_throughput [--json FILE]`.

Beside it the bare detector, bytes in, at its best batch size and with the same number of threads;
both take turns, so that whatever else the machine does hits both. The peer, `mlflow models serve`
on the same version, follows in the same run.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from benchmarks.fleet import (
    BareModel,
    Client,
    ModelClient,
    bare,
    fleet,
    images_per_second,
    mlflow_models_serve,
    prepare,
)
from benchmarks.rows import compared, write_rows


def main() -> None:
    """Measure each concurrency and print images a second."""
    parser = argparse.ArgumentParser(description="Images a second through the fleet.")
    parser.add_argument("--backbone", default="builtin", help="or an architecture, e.g. ViT-B-16")
    parser.add_argument("--proxy", choices=["haproxy", "default"], default="haproxy")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2, help="of a round, each side")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, data = prepare(folder, options.backbone)
        model = bare(prompt_set, options.threads)
        bare_rates: dict[int, list[float]] = defaultdict(list)
        fleet_rates: dict[int, list[float]] = defaultdict(list)
        peer_rates: dict[int, float] = {}
        with fleet(
            folder, prompt_set, haproxy=options.proxy == "haproxy", threads=options.threads
        ) as running:
            for _ in range(options.rounds):
                for batch in options.batch:
                    bare_rates[batch].append(_bare(model, data, batch, options.seconds))
                for concurrency in options.concurrency:
                    fleet_rates[concurrency].append(
                        images_per_second(
                            partial(Client, running.url),
                            data,
                            concurrency=concurrency,
                            seconds=options.seconds,
                        )
                    )
            if options.peer:
                with mlflow_models_serve(
                    folder, running.tracking_uri, threads=options.threads
                ) as peer_url:
                    for concurrency in options.concurrency:
                        peer_rates[concurrency] = images_per_second(
                            partial(ModelClient, peer_url),
                            data,
                            concurrency=concurrency,
                            seconds=options.rounds * options.seconds,
                        )
    best, alone = max(
        ((batch, statistics.mean(rates)) for batch, rates in bare_rates.items()),
        key=lambda pair: pair[1],
    )
    print(
        f"{options.backbone}, {options.proxy} proxy, {options.threads} threads; the bare detector"
        f" at batch {best}\n"
    )
    rows = []
    for concurrency, rates in fleet_rates.items():
        ours = statistics.mean(rates)
        baselines = {"the bare detector": alone}
        if options.peer:
            baselines["mlflow models serve"] = peer_rates[concurrency]
        rows += [
            compared(
                f"{options.backbone}, {concurrency} clients against {what}",
                ours,
                baseline,
                "images/s",
                more_is_better=True,
            )
            for what, baseline in baselines.items()
        ]
    write_rows(rows, options.json)


def _bare(model: BareModel, data: bytes, batch: int, seconds: float) -> float:
    """Images a second in batches of this size."""
    model.inspect([data] * batch)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        model.inspect([data] * batch)
        done += batch
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
