"""From a replica's end to the next one's first answer: `python -m benchmarks.serving_start`.

The replica is killed; Serve notices and starts another process, which loads the backbone and its
prompt set and tests it: the time from when that process is a replica to the first answer is given
apart. Beside it, the same loading in a bare process.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks.fleet import Client, RunningFleet, fleet, prepare
from benchmarks.rows import compared, write_rows

_BARE = """
import sys
from apt_ray.detection.detector import Detector
from apt_ray.features.clip import load_backbone
from apt_ray.images import decode_image
from apt_ray.detection.prompt_set import PromptSet
prompt_set = PromptSet.from_bytes(open(sys.argv[1], "rb").read())
detector = Detector(load_backbone(prompt_set.backbone), prompt_set)
detector.inspect([decode_image(open(sys.argv[2], "rb").read())])
"""


def main() -> None:
    """Measure and print seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, data = prepare(folder, "builtin")
        (folder / "set").write_bytes(prompt_set.to_bytes())
        (folder / "image").write_bytes(data)
        bare, killed, started_as_replica = [], [], []
        with fleet(folder, prompt_set, threads=1) as running:
            for _ in range(options.times):
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", _BARE, folder / "set", folder / "image"], check=True
                )
                bare.append(time.perf_counter() - started)
                client = Client(running.url)
                assert client.inspect(data) == 200
                before = running.replica()
                before.kill()
                started = time.perf_counter()
                with ThreadPoolExecutor(1) as watcher:
                    seen = watcher.submit(_next_replica, running, before.pid)
                    while client.inspect(data) != 200:
                        time.sleep(0.02)
                answered = time.perf_counter()
                killed.append(answered - started)
                started_as_replica.append(answered - seen.result())
    alone = statistics.median(bare)
    print(f"{options.times} times, median; baseline: a bare process that loads the same\n")
    rows = [
        compared(
            "replica's start to first answer", statistics.median(started_as_replica), alone, "s"
        ),
        compared("kill to first answer", statistics.median(killed), alone, "s"),
        compared("kill to first answer, slowest", max(killed), alone, "s"),
    ]
    write_rows(rows, options.json)


def _next_replica(running: RunningFleet, before: int) -> float:
    """When a process other than `before` became a replica."""
    while True:
        with suppress(LookupError):
            if running.replica().pid != before:
                return time.perf_counter()
        time.sleep(0.1)


if __name__ == "__main__":
    main()
