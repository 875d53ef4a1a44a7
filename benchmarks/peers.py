"""APT beside anomalib's PatchCore and PaDiM: `make peers PEERS_ARGS="--data DIR"`.

DIR holds categories in the layout of MVTec AD, of VisA, or plain folders. All are fitted on the
same support sets. anomalib's models are its own code, with its preprocessing and its score rules,
on the trunk that APT can read too: the same weights of EfficientNet-Lite0, the same stages and
size. Nothing is chosen on test images. With `--json FILE` finished rows are kept, and the same
command goes on after a stop.

The second table says what may be claimed: differences of means over the categories with paired 95 %
bootstrap intervals over test images and seeds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from apt_ray.cli.flags import add_backbone_flags, given_backbone, integers
from apt_ray.config import (
    TRUNK,
    TRUNK_INPUT_SIZE,
    TRUNK_STAGES,
    BackboneSpec,
    FitSettings,
)
from apt_ray.data.folders import Category, find_categories
from apt_ray.detection.detector import Detector
from apt_ray.errors import AptError
from apt_ray.features.clip import load_backbone
from apt_ray.files import Location, location
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from apt_ray.validation.evaluation import TestSet
from apt_ray.validation.intervals import Floats, resample
from benchmarks.anomalib_models import Fit, Inspect, load_padim, load_patchcore, require_anomalib
from benchmarks.ledger import Key, Ledger, Row
from benchmarks.tables import OURS, format_claims, format_rows

_BATCH = 16

_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Makes glibc give large tensors back as they are freed. Else the peak of PatchCore is that of a
heap in pieces: the loop that draws its coreset keeps a small tensor behind each large one."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What the methods read.

    Attributes:
        backbone: of APT.
        stages, size: of the trunk that anomalib's models read; pixels a side.
        threads: of torch.
    """

    backbone: BackboneSpec
    stages: tuple[int, ...]
    size: int
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A method.

    Attributes:
        about: what it is, in a line.
        load: gives what fits it, with all weights loaded.
        shots: the least that it can be fitted on.
    """

    name: str
    about: str
    load: Callable[[Setup], Fit]
    shots: int = 1


def load_apt(setup: Setup) -> Fit:
    """`apt_ray.fit` with default settings, scored by prompts and reference."""
    backbone = load_backbone(setup.backbone)

    def fit_apt(category: str, support: Sequence[Location], seed: int) -> Inspect:
        prompt_set = fit(category, support, FitSettings(seed=seed), backbone=backbone)
        detector = Detector(backbone, prompt_set)

        def inspect(images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
            return detector.score(backbone.encode_images(backbone.preprocess(images)))

        return inspect

    return fit_apt


PEERS = (
    Peer(name=OURS, about="apt_ray.fit with default settings", load=load_apt),
    Peer(
        name="patchcore",
        about="anomalib's PatchCore: a coreset of a tenth of the patches, 9 neighbours",
        load=lambda setup: load_patchcore(setup.stages, setup.size),
    ),
    Peer(
        name="padim",
        about="anomalib's PaDiM, all channels; from 2 shots on, one has no covariance",
        load=lambda setup: load_padim(setup.stages, setup.size),
        shots=2,
    ),
)


def peak_mb(name: str, category: Category, shots: int, seed: int, setup: Setup) -> float:
    """Fit a method and inspect a batch; the most memory that this process ever held.

    Millions of bytes, libraries and weights included. It is to be a process of its own.
    """
    fit_peer = _load(name, setup)
    inspect = fit_peer(category.name, category.support_set(shots, seed), seed)
    inspect([read_image(image.path) for image in category.test[:_BATCH]])
    # Not getrusage: its peak is at least that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(kibibytes) / 1e6


def measure(
    name: str, category: Category, shots: int, seeds: Sequence[int], setup: Setup
) -> list[tuple[Row, dict[str, Floats]]]:
    """Fit a method on each seed's support set and inspect all test images; each with resamples."""
    fit_peer = _load(name, setup)
    test = TestSet.read(category)
    supports = {seed: category.support_set(shots, seed) for seed in seeds}
    warm_up = fit_peer(category.name, supports[seeds[0]], seeds[0])
    warm_up([read_image(image.path) for image in category.test[:_BATCH]])
    measured = []
    for seed, support in supports.items():
        begun = time.perf_counter()
        inspect = fit_peer(category.name, support, seed)
        fit_seconds = time.perf_counter() - begun
        inspect_seconds = 0.0

        def score(
            index: list[int], inspect: Inspect = inspect
        ) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal inspect_seconds
            begun = time.perf_counter()
            found = inspect([read_image(category.test[i].path) for i in index])
            inspect_seconds += time.perf_counter() - begun
            return found

        result = test.result(score, variant=name, support=support, seed=seed)
        row = Row.of(
            result,
            fit_seconds=fit_seconds,
            image_ms=1000 * inspect_seconds / len(result.scores.names),
        )
        measured.append((row, resample(result.scores)))
    return measured


def measure_missing(
    categories: Sequence[Category],
    ledger: Ledger,
    setup: Setup,
    *,
    names: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
) -> None:
    """Add every row that the ledger lacks."""
    places = [
        (peer.name, category, count)
        for category, count, peer in product(categories, shots, PEERS)
        if peer.name in names and count >= peer.shots
    ]
    for name, category, count in tqdm(places, desc="peers", disable=None):
        missing = [
            seed for seed in seeds if Key(name, category.name, count, seed) not in ledger.rows
        ]
        if missing:
            peak = _alone(peak_mb, name, category, count, missing[0], setup, environment=_RETURNED)
            for row, resamples in _alone(measure, name, category, count, missing, setup):
                ledger.add(replace(row, peak_mb=peak), resamples)


def _load(name: str, setup: Setup) -> Fit:
    torch.set_num_threads(setup.threads)
    (peer,) = (peer for peer in PEERS if peer.name == name)
    return peer.load(setup)


def _alone(
    function: Callable[..., T], *arguments: object, environment: Mapping[str, str] = {}
) -> T:
    """What a function gives in a process of its own."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, or 1 after a clear error."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; with --json FILE the same command goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    names = options.methods or [peer.name for peer in PEERS]
    if set(names) != {OURS}:
        require_anomalib()
    categories = find_categories(options.data, options.categories)
    spec = given_backbone(options)
    of_trunk = spec.reads == TRUNK
    setup = Setup(
        backbone=spec,
        stages=(of_trunk and spec.reference_layers) or TRUNK_STAGES,
        size=options.size or spec.reference_input_size or TRUNK_INPUT_SIZE,
        threads=options.threads,
    )
    backbone = load_backbone(spec)
    anomalib = version("anomalib") if find_spec("anomalib") else "none"
    described = {
        "data": str(categories[0].root.parent),
        "backbone": backbone.fingerprint,
        "settings": FitSettings().model_dump(),
        "version": version("apt-ray"),
        "anomalib": anomalib,
        "stages": setup.stages,
        "size": setup.size,
        "threads": setup.threads,
    }
    ledger = Ledger(options.json, described)
    measure_missing(
        categories,
        ledger,
        setup,
        names=names,
        shots=options.shots,
        seeds=options.seeds,
    )
    print(
        f"APT on {spec.name}, {backbone.input_size} px, reference {spec.reads};"
        f" anomalib {anomalib} on stages {setup.stages} of the trunk, {setup.size} px;"
        f" {setup.threads} threads\n"
    )
    print(format_rows(ledger))
    print(f"\n{format_claims(ledger)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        epilog="methods:\n" + "\n".join(f"  {peer.name:12} {peer.about}" for peer in PEERS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=location, required=True, help="folder of categories, or s3://"
    )
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        choices=[peer.name for peer in PEERS],
        metavar="NAME",
        help="only these",
    )
    parser.add_argument("--shots", type=integers, default=(4,), help="support images (4)")
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2), help="support sets (0,1,2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, go on here")
    add_backbone_flags(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="pixels a side of anomalib's models (those of --reference-input-size,"
        f" {TRUNK_INPUT_SIZE})",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (all)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
