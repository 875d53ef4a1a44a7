"""From the move of an alias to the first answer: `python -m benchmarks.registry_follow`.

A fleet that polls at its default interval is asked again and again while the champion of its
category moves to and fro, at a random time after the last poll. A webhook spares this wait: see
`tests/serving/test_changes.py`.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from urllib.request import Request

from mlflow import MlflowClient

from apt_ray.devtools.local_stack import fetch
from apt_ray.registry import open_registry
from benchmarks.fleet import CATEGORY, fleet, prepare
from benchmarks.rows import compared, write_rows
from serving.settings import RegistrySettings

_PAUSE_S = 0.1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="From the move of an alias to the first answer.")
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    g = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        prompt_set, data = prepare(Path(name), "builtin")
        with fleet(Path(name) / "fleet", prompt_set, threads=1) as running:
            open_registry(running.tracking_uri).register(prompt_set, pictures={}, trials=[])
            client = MlflowClient(running.tracking_uri, registry_uri=running.tracking_uri)
            request = Request(f"{running.url}/v1/{CATEGORY}/inspect", data=data)
            seconds = []
            for move in range(options.moves):
                time.sleep(g.uniform(0, 10))
                version = 2 - move % 2
                client.set_registered_model_alias(f"apt-{CATEGORY}", "champion", str(version))
                moved = time.perf_counter()
                while json.loads(fetch(request))["version"] != version:
                    time.sleep(_PAUSE_S)
                seconds.append(time.perf_counter() - moved)
    poll_s = RegistrySettings().poll_s
    print(f"{options.moves} moves; baseline: the interval of polling\n")
    rows = [
        compared("followed, median", statistics.median(seconds), poll_s, "s"),
        compared("followed, slowest", max(seconds), poll_s, "s"),
    ]
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
