"""What it costs to ask the registry for every category's champion and candidate.

    python -m benchmarks.registry_poll [--categories 1000] [--json FILE]

One category is registered and moved for real; the others are copies of its rows in the server's
sqlite database. The baseline is MLflow's own client with the same request.
"""

import argparse
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from mlflow import MlflowClient

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.detection.calibration import calibrate
from apt_ray.detection.prompt_set import PromptSet, Provenance
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import Scale, Scales
from apt_ray.devtools.local_stack import Server, free_ports, launch_mlflow
from apt_ray.registry import open_registry, promote
from benchmarks.rows import compared, write_rows

_TABLES = (
    "registered_models",
    "registered_model_tags",
    "registered_model_aliases",
    "model_versions",
    "model_version_tags",
)
_MODEL = "apt-first"
_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--categories", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
        folder = Path(name) / "mlflow"
        with launch_mlflow(folder, port=free_ports(1)[0]) as server:
            server.wait_until_ready("/health")
            registry = open_registry(server.url)
            for seed in (0, 1):
                registry.register(_prompt_set(seed), pictures={}, trials=[])
            promote(registry, "first", force="so that the version has all tags")
            _copy(folder / "mlflow.db", options.categories - 1)
            assert len(registry.aliases()) == options.categories
            client = MlflowClient(server.url, registry_uri=server.url)
            ours = _measure(server, registry.aliases)
            theirs = _measure(
                server,
                lambda: client.search_registered_models("name LIKE 'apt-%'", max_results=1000),
            )
    print(f"{options.categories} categories, median of {_REPEATS}; baseline: MLflow's client\n")
    write_rows([compared(what, ours[what], theirs[what], "s") for what in ours], options.json)


def _measure(server: Server, ask: Callable[[], object]) -> dict[str, float]:
    walls, servers, own = [], [], []
    for _ in range(_REPEATS):
        begun = time.monotonic(), _cpu_of(server.pid), time.process_time()
        ask()
        walls.append(time.monotonic() - begun[0])
        servers.append(_cpu_of(server.pid) - begun[1])
        own.append(time.process_time() - begun[2])
    return {
        "wall": median(walls),
        "CPU of the server": median(servers),
        "CPU of the caller": median(own),
    }


def _cpu_of(pid: int) -> float:
    """Seconds that a process and all below it have computed."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    family = {pid}
    while more := {child for child, parent in pairs if parent in family} - family:
        family |= more
    ticks = 0
    for member in family:
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _copy(path: Path, count: int) -> None:
    with sqlite3.connect(path, timeout=60) as database:
        for table in _TABLES:
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            rows = database.execute(f"SELECT * FROM {table} WHERE name = ?", [_MODEL]).fetchall()
            place = columns.index("name")
            marks = ", ".join("?" * len(columns))
            database.executemany(
                f"INSERT INTO {table} VALUES ({marks})",
                [
                    (*row[:place], f"{_MODEL}-{copy:04d}", *row[place + 1 :])
                    for copy in range(count)
                    for row in rows
                ],
            )
    database.close()


def _prompt_set(seed: int) -> PromptSet:
    text_PE = torch.eye(2, 8)
    return PromptSet(
        provenance=Provenance(
            library_version="0",
            category="first",
            backbone=BackboneSpec(),
            fingerprint="0" * 32,
            settings=FitSettings(seed=seed),
            shots=4,
            support_hash="0" * 64,
            support_names=("0.png",),
            created="2025-01-01T00:00:00+00:00",
            threshold=calibrate([0.1, 0.2, 0.3], 0.25),
            scales=Scales(prompts=Scale(mean=0, sd=1), layers={2: Scale(mean=0, sd=1)}),
        ),
        text_features=text_PE,
        contexts=torch.zeros(2, 8, 4),
        meta_features=text_PE.flip(0).contiguous(),
        memory=ReferenceMemory({2: torch.ones(4, 4)}),
    )


if __name__ == "__main__":
    main()
