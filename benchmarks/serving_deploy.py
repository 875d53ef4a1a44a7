"""A long tail of categories in one pool: `python -m benchmarks.serving_deploy [--json FILE]`.

Every category is registered for real. Then a fleet file with one of them is deployed, one with all,
the same again, and one with all but one. Each time is that of the whole command, from its start
until every category answers.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apt_ray.devtools.local_stack import LocalStack, free_ports
from apt_ray.registry import open_registry
from benchmarks.fleet import deploy, prepare
from benchmarks.rows import compared, write_rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A long tail of categories in one pool.")
    parser.add_argument("--categories", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="of the pool's one replica")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = [f"part-{number:04}" for number in range(options.categories)]
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        folder = Path(name)
        prompt_set, _ = prepare(folder, "builtin")
        stack = LocalStack(folder / "stack")
        stack.start()
        try:
            registry = open_registry(stack.environment["MLFLOW_TRACKING_URI"])

            def register(name: str) -> None:
                registry.register(prompt_set.with_category(name), pictures={}, trials=[])

            started = time.perf_counter()
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(register, names))
            registering = (time.perf_counter() - started) / len(names)
            seconds = {}
            (port,) = free_ports(1)
            file = folder / "fleet.yaml"
            for what, served in (
                ("one", names[:1]),
                (f"all {len(names)}", names),
                ("the same again", names),
                ("one less", names[1:]),
            ):
                fleet = {
                    "pools": {"tail": {"threads": options.threads}},
                    "categories": {name: {"pool": "tail"} for name in served},
                    "registry": {"cache": str(folder / "cache")},
                }
                file.write_text(json.dumps(fleet))
                started = time.perf_counter()
                deploy(stack, file, port)
                seconds[what] = time.perf_counter() - started
        finally:
            stack.stop()
    print(f"registering: {registering:.2f} s a category; baseline: deploying one\n")
    rows = [compared(f"deploy {what}", took, seconds["one"], "s") for what, took in seconds.items()]
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
