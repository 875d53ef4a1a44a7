"""Images a second through the fleet: `python -m benchmarks.serving_throughput [--json FILE]`.

Beside it the bare detector, bytes in, at its best batch size and with the same number of threads,
measured before and after in the same run; and the peer, `mlflow models serve` on the same version.
"""

import argparse
import statistics
import tempfile
import time
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
    write,
)


def main() -> None:
    """Measure each concurrency and print images a second."""
    parser = argparse.ArgumentParser(description="Images a second through the fleet.")
    parser.add_argument("--backbone", default="builtin", help="or an architecture, e.g. ViT-B-16")
    parser.add_argument("--proxy", choices=["haproxy", "default"], default="haproxy")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, data = prepare(folder, options.backbone)
        model = bare(prompt_set, options.threads)
        with fleet(
            folder, prompt_set, haproxy=options.proxy == "haproxy", threads=options.threads
        ) as running:
            before = _bare(model, data, options.batch, options.seconds / len(options.batch))
            served = {
                concurrency: images_per_second(
                    partial(Client, running.url),
                    data,
                    concurrency=concurrency,
                    seconds=options.seconds,
                )
                for concurrency in options.concurrency
            }
            after = _bare(model, data, options.batch, options.seconds / len(options.batch))
            with mlflow_models_serve(
                folder, running.tracking_uri, threads=options.threads
            ) as peer_url:
                peer = {
                    concurrency: images_per_second(
                        partial(ModelClient, peer_url),
                        data,
                        concurrency=concurrency,
                        seconds=options.seconds,
                    )
                    for concurrency in options.concurrency
                }
    best = max(before, key=lambda batch: before[batch] + after[batch])
    alone = statistics.mean([before[best], after[best]])
    write(
        options.json,
        {
            "backbone": options.backbone,
            "proxy": options.proxy,
            "threads": options.threads,
            "bare": {"batch": best, "images_per_second": round(alone, 1)},
            "served": [
                {
                    "concurrency": concurrency,
                    "images_per_second": round(rate, 1),
                    "share_of_bare": round(rate / alone, 3),
                    "mlflow_models_serve_images_per_second": round(peer[concurrency], 1),
                }
                for concurrency, rate in served.items()
            ],
        },
    )


def _bare(model: BareModel, data: bytes, batches: list[int], seconds: float) -> dict[int, float]:
    """Batch size -> images a second."""
    rates = {}
    for batch in batches:
        model.inspect([data] * batch)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            model.inspect([data] * batch)
            done += batch
        rates[batch] = done / (time.perf_counter() - started)
    return rates


if __name__ == "__main__":
    main()
