"""A batch beside the bare model: `python -m benchmarks.batch [--json FILE]`.

The bare model is the detector in one process, files in, with as many threads as the batch's actor
and the same runtime (`--runtime`): it reads, decodes and inspects in turn. The batch is
`serving.bulk` on a Ray of its own; the time that its processes take to start does not count, for
both inspect a while before the clock runs. Both take turns, so that whatever else the machine does
hits both.

`--memory N` inspects N generated images instead, with random weights of a small architecture, for
what is decided of them does not matter here: it adds up the proportional set sizes of all processes
(shared pages are counted once) again and again, and draws them into docs/batch-memory.png. Where it
is ended early, it tells what it has.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import torch
from PIL import Image

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from benchmarks.common import random_weights
from benchmarks.rows import compared, write_rows
from serving.settings import Runtime

_CATEGORY = "washer"
_POOL = 200
_BLOCK_IMAGES = 256
_WATCH_S = 5  # to read what all processes hold costs a quarter of a second
_PLOT = Path(__file__).parents[1] / "docs" / "batch-memory.png"


def main() -> None:
    """Print images a second of both, or the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="of a turn of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block-images", type=int, default=64)
    parser.add_argument("--runtime", choices=get_args(Runtime), default="auto")
    parser.add_argument("--memory", type=int, metavar="N", help="inspect N images, watch memory")
    parser.add_argument("--plot", type=Path, default=_PLOT, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        if options.memory:
            _memory(options, Path(name))
        else:
            _throughput(options, Path(name))


def _throughput(options: argparse.Namespace, folder: Path) -> None:
    import ray

    from serving.bulk.inputs import find_inputs
    from serving.bulk.pipeline import Resources, inspect_all
    from serving.bulk.results import Output
    from serving.bulk.versions import versions_of
    from serving.runtime import choose_runtime

    prompt_set = _prepare(folder, BackboneSpec())
    pictures = sorted((folder / "samples" / _CATEGORY).rglob("*.png"))
    paths = [folder / "images" / f"{number:05}.png" for number in range(options.images)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        shutil.copy(pictures[number % len(pictures)], path)
    torch.set_num_threads(options.threads)
    backbone = load_backbone(prompt_set.backbone)
    choose_runtime(backbone, options.runtime, threads=options.threads)
    detector = Detector(backbone, prompt_set)
    versions = versions_of(
        [_CATEGORY], registry=None, prompt_set=folder / f"{_CATEGORY}.safetensors"
    )
    inputs = find_inputs([str(folder / "images")], category=_CATEGORY)
    # Ray makes its workers nice by default; the bare side is not, and both share the machine.
    os.environ.update(RAY_worker_niceness="0")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    resources = Resources(
        actors=1,
        threads=options.threads,
        gpus=0,
        decoders=1,
        writers=1,
        batch_size=options.batch,
        block_images=options.block_images,
        runtime=options.runtime,
    )
    alone: list[float] = []
    batch: list[float] = []
    for turn in range(options.rounds + 1):
        place = Output.at(str(folder / f"out-{turn}"))
        bare = _bare(detector, paths, options.batch)
        run = inspect_all(inputs, versions, place, resources, say=lambda _: None)
        assert run.images == len(paths)
        rate = run.steady_rate
        assert rate is not None
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in run.busy.items())
        print(f"bare {bare:.1f}/s, batch {rate:.1f}/s once it runs ({busy})", flush=True)
        if turn:  # the first warms both up
            alone.append(bare)
            batch.append(rate)
    print(
        f"\n{options.runtime}, {options.threads} threads, batches of {options.batch},"
        f" {options.images} images\n"
    )
    row = compared(
        "a batch against the bare model",
        statistics.mean(batch),
        statistics.mean(alone),
        "images/s",
        more_is_better=True,
    )
    write_rows([row], options.json)


@torch.inference_mode()
def _bare(detector: Detector, paths: Sequence[Path], batch: int) -> float:
    """Images a second, files in, in batches of this size."""
    started = time.perf_counter()
    for first in range(0, len(paths), batch):
        reading = detector.prompt_set.reading
        detector.inspect([read_image(path, reading) for path in paths[first : first + batch]])
    return len(paths) / (time.perf_counter() - started)


def _prepare(folder: Path, spec: BackboneSpec) -> PromptSet:
    """A prompt set of 4 shots after a few steps, and its file."""
    write_samples(folder / "samples")
    (category,) = find_categories(folder / "samples", [_CATEGORY])
    prompt_set = fit(
        _CATEGORY,
        category.support_set(4, seed=0),
        FitSettings(steps=2),
        backbone=load_backbone(spec),
    )
    prompt_set.save(folder / f"{_CATEGORY}.safetensors")
    return prompt_set


def _memory(options: argparse.Namespace, folder: Path) -> None:
    _prepare(folder, random_weights("ViT-S-32-alt", folder))
    _generate(folder / "images", options.memory)
    batch = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "serving.batch", "--ray-address", "local"),
            *("--input", str(folder / "images"), "--output", str(folder / "out")),
            *("--prompt-set", str(folder / f"{_CATEGORY}.safetensors")),
            *("--block-images", str(_BLOCK_IMAGES)),
        ],
        env=os.environ | {"RAY_worker_niceness": "0"},
    )
    samples: list[tuple[float, float, int]] = []
    started = time.monotonic()
    try:
        while batch.poll() is None:
            blocks = len(list((folder / "out").glob("inspections/*.parquet")))
            samples.append((time.monotonic() - started, _held(batch.pid), blocks))
            time.sleep(_WATCH_S)
    except KeyboardInterrupt:
        batch.terminate()
        batch.wait()
    blocks = samples[-1][2]
    images = _BLOCK_IMAGES * blocks if batch.returncode else options.memory
    steady = [(at, held) for at, held, rows in samples if rows >= 0.1 * blocks]
    half = len(steady) // 2
    early, late = (
        statistics.mean(held for _, held in part) for part in (steady[:half], steady[half:])
    )
    print(f"{images:,} images, highest {max(held for _, held, _ in samples):.2f} GB")
    _plot(samples, images, options.plot)
    row = compared("memory, second half of the batch against the first", late, early, "GB")
    write_rows([row], options.json)
    sys.exit(batch.returncode)


def _generate(folder: Path, number: int) -> None:
    """Images of a small pool of pixels, each with a few of its own, in folders of a thousand."""
    draws = np.random.default_rng(0)
    pool = draws.integers(0, 256, (_POOL, 64, 64, 3), dtype=np.uint8)
    for index in range(number):
        pixels = pool[index % _POOL].copy()
        pixels[0, 0] = (index & 255, index >> 8 & 255, index >> 16)
        path = folder / f"{index // 1000:04}" / f"{index:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=0)


def _held(pid: int) -> float:
    """GB of a process and all below it."""
    held = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                held += each.memory_full_info().pss
    return held / 1e9


def _plot(samples: Sequence[tuple[float, float, int]], images: int, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    blocks = max(1, samples[-1][2])
    axes.plot([at / 60 for at, _, _ in samples], [held for _, held, _ in samples], "C0")
    axes.set(xlabel="minutes", ylabel="memory of all processes, GB", ylim=(0, None))
    beside = axes.twinx()
    share = [images * done / blocks for _, _, done in samples]
    beside.plot([at / 60 for at, _, _ in samples], share, "C1--")
    beside.set(ylabel="images inspected", ylim=(0, None))
    beside.yaxis.label.set_color("C1")
    axes.yaxis.label.set_color("C0")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
