"""Peak memory of a whole search: `python -m benchmarks.search_memory`.

Runs `tuning/search.py` with its own Ray and MLflow server on this machine, and adds up the
proportional set sizes of all their processes (shared pages are counted once), ten times a second.
`--backbone ViT-B-16` takes random weights, which weigh what real ones do.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from apt_ray.data.samples.factory import write_samples
from apt_ray.devtools.local_stack import LocalStack
from benchmarks.common import random_weights
from benchmarks.rows import compared, write_rows

_LIMIT_GB = 6.0


def main() -> None:
    """Print the peak against the limit, and what held it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="ViT-B-16", metavar="NAME")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--engine", choices=("auto", "shared", "own"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="apt-ray-bench-") as name:
        peak, parts = _peak(options, Path(name))
    for title, gigabytes in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"{gigabytes:6.2f} GB  {title}")
    name = f"peak memory, {options.trials} trials, {options.backbone}"
    write_rows([compared(name, peak, _LIMIT_GB, "GB")], options.json)


def _peak(options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, float]]:
    """The highest sum, in GB, and what each kind of process held of it."""
    write_samples(folder / "data")
    spec = random_weights(options.backbone, folder)
    weights = (
        () if spec.pretrained is None else ("--pretrained", spec.pretrained, "--no-quick-gelu")
    )
    stack = LocalStack(folder / "stack")
    stack.start()
    try:
        search = subprocess.Popen(
            [
                *(sys.executable, "-m", "tuning.search", "--data", str(folder / "data")),
                *("--categories", "washer", "--trials", str(options.trials)),
                *("--max-steps", str(options.steps), "--engine", options.engine),
                *("--backbone", spec.name, *weights),
                *("--storage", str(folder / "storage"), "--bank-cache", str(folder / "banks")),
            ],
            env=os.environ | stack.environment,
        )
        roots = [search.pid, *(server.pid for server in stack.servers)]
        peak, parts = 0.0, dict[str, float]()
        while search.poll() is None:
            now = _held(roots)
            if sum(now.values()) > peak:
                peak, parts = sum(now.values()), now
            time.sleep(0.1)
        if search.returncode:
            sys.exit(search.returncode)
    finally:
        stack.stop()
    return peak, parts


def _held(roots: list[int]) -> dict[str, float]:
    """GB by kind of process, over the processes of `roots` and all below them."""
    held: dict[str, float] = {}
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            for each in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
                    title = " ".join(each.cmdline())
                    kind = title.split("(")[0] if title.startswith("ray") else each.name()
                    held[kind] = held.get(kind, 0.0) + each.memory_full_info().pss / 1e9
    return held


if __name__ == "__main__":
    main()
