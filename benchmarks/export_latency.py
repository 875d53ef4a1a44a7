"""Exported graphs against PyTorch: `python -m benchmarks.export_latency [--json FILE]`.

Every runtime has a process of its own, so that threads of one that wait actively take nothing from
another's; they are asked in turns, so that other work on the machine delays all alike. Timed is
what the graph does: from pixels to map, score and verdict, `--batch` images at a time; "replica" is
what a fleet's replica does with `runtime: openvino`.

With `--data DIR` it measures instead what a graph's precision costs: all test images of each
category, scored by the detector and by its graphs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from apt_ray import Detector, FitSettings, PromptSet, find_categories, fit, load_backbone
from apt_ray.auroc import auroc
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.detector import probe_image
from apt_ray.export.compiled import compile_encoders
from apt_ray.export.exported import ExportedDetector, pixels_of
from apt_ray.export.exporting import PRECISIONS, export_detector
from apt_ray.export.header import Format, GraphPrecision
from apt_ray.images import read_image
from benchmarks.rows import compared, write_rows

_PYTORCH = "PyTorch"
_REPLICA = "replica: encoders by OpenVINO, rule by PyTorch"
_WARM_UPS = 3


def main() -> None:
    """Print a table of latencies, or of differences."""
    parser = argparse.ArgumentParser(description="Exported graphs against PyTorch.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each runtime (15)")
    parser.add_argument("--passes", type=int, default=4, help="of each in its turn (4)")
    parser.add_argument("--batch", type=int, default=1, help="images of one pass (1)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's time, which other work on the machine changes less",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, help="labelled categories: differences, not times")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        if options.data:
            _print_differences(options.data, Path(folder))
            return
        files = _export_sample(Path(folder), with_fixed_batch=options.batch == 1)
        rows = []
        for threads in options.threads:
            medians = _latencies(files, threads, options)
            rows += [
                compared(
                    f"{name}, {options.batch} at once, {threads} threads",
                    ms,
                    medians[_PYTORCH],
                    "ms an image",
                )
                for name, ms in medians.items()
            ]
    print("baseline: PyTorch\n")
    write_rows(rows, options.json)


def _export_sample(folder: Path, *, with_fixed_batch: bool) -> dict[str, Path]:
    """A prompt set of a sample product, and all of its graphs."""
    write_samples(folder / "data")
    (category,) = find_categories(folder / "data", ["washer"])
    backbone = load_backbone()
    settings = FitSettings(steps=1)
    prompt_set = fit("washer", category.support_set(4, 0), settings, backbone=backbone)
    files = {_PYTORCH: folder / "washer.safetensors"}
    prompt_set.save(files[_PYTORCH])
    files[_REPLICA] = files[_PYTORCH]
    detector = Detector(backbone, prompt_set)
    for name, write in _graphs(detector, folder, with_fixed_batch=with_fixed_batch).items():
        files[name] = write()
    return files


def _graphs(
    detector: Detector, folder: Path, *, with_fixed_batch: bool
) -> dict[str, Callable[[], Path]]:
    """How each graph of a detector is written."""

    def writer(kind: Format, precision: GraphPrecision, batch: int | None) -> Callable[[], Path]:
        place = folder / f"{kind}-{precision}-{batch}"
        return lambda: export_detector(detector, kind, precision=precision, batch=batch).save(place)

    return {
        f"{kind} {precision}" + ("" if batch is None else ", fixed batch"): writer(
            kind, precision, batch
        )
        for kind, precisions in PRECISIONS.items()
        for precision in precisions
        for batch in ((None, 1) if with_fixed_batch and precision == "float32" else (None,))
    }


def _latencies(
    files: dict[str, Path], threads: int, options: argparse.Namespace
) -> dict[str, float]:
    """Median milliseconds an image of each runtime."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, file in files.items():
        ours, theirs = context.Pipe()
        task = (theirs, file, name == _REPLICA, threads, options.batch, options.cpu_time)
        process = context.Process(target=_work, args=task, daemon=True)
        process.start()
        ours.recv()
        workers[name] = (process, ours)
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for turn in tqdm(range(_WARM_UPS + options.rounds), desc="rounds", disable=None):
        for name, (_, ours) in workers.items():
            ours.send(options.passes)
            taken = ours.recv()
            if turn >= _WARM_UPS:
                seconds[name] += taken
    for process, ours in workers.values():
        ours.send(None)
        process.join()
    return {
        name: 1000 * statistics.median(taken) / options.batch for name, taken in seconds.items()
    }


def _work(
    pipe: Connection, file: Path, is_replica: bool, threads: int, batch: int, cpu_time: bool
) -> None:
    clock = time.process_time if cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    run = _runner(file, is_replica=is_replica, threads=threads, batch=batch)
    run()
    pipe.send(None)
    while (count := pipe.recv()) is not None:
        taken = []
        for _ in range(count):
            started = clock()
            run()
            taken.append(clock() - started)
        pipe.send(taken)


def _runner(file: Path, *, is_replica: bool, threads: int, batch: int) -> Callable[[], object]:
    if file.suffix != ".safetensors":
        exported = ExportedDetector.load(file, threads=threads)
        size = (exported.header.width, exported.header.height)
        pixels_BHW3 = pixels_of([probe_image(size)] * batch, size)
        return lambda: exported.run(pixels_BHW3)
    prompt_set = PromptSet.load(file)
    backbone = load_backbone(prompt_set.backbone)
    if is_replica:
        compile_encoders(backbone, threads=threads)
    detector = Detector(backbone, prompt_set)
    pixels_B3HW = backbone.preprocess([probe_image((backbone.input_size,) * 2)] * batch)

    @torch.inference_mode()
    def run() -> object:
        return detector.score(backbone.encode_images(pixels_B3HW))

    return run


def _print_differences(data: Path, folder: Path) -> None:
    """Image AUROC of each precision, and how far its scores are from the detector's; a line a
    category as soon as it is measured."""
    backbone = load_backbone()
    aurocs: dict[str, list[float]] = {}
    print("| category | graph | image AUROC, % | largest difference of a score | other verdicts |")
    print("|---|---|---|---|---|")
    for category in find_categories(data):
        support = category.support_set(4, 0)
        detector = Detector(backbone, fit(category.name, support, backbone=backbone))
        threshold = detector.prompt_set.threshold
        graphs = {
            name: ExportedDetector.load(write())
            for name, write in _graphs(
                detector, folder / category.name, with_fixed_batch=False
            ).items()
            if "torchscript" not in name
        }
        tested = [image for image in category.test if image.path not in support]
        labels = np.array([image.is_anomalous for image in tested])
        scores: dict[str, list[float]] = {name: [] for name in (_PYTORCH, *graphs)}
        for image in tqdm(tested, desc=category.name, disable=None):
            picture = read_image(image.path, detector.reading)
            features = backbone.encode_images(backbone.preprocess([picture]))
            scores[_PYTORCH].append(float(detector.score(features)[1]))
            for name, graph in graphs.items():
                scores[name].append(float(graph.run(graph.pixels([picture]))[1][0]))
        expected = np.array(scores[_PYTORCH])
        for name, found in scores.items():
            values = np.array(found)
            aurocs.setdefault(name, []).append(auroc(np.sort(values[~labels]), values[labels]))
            flips = sum(
                threshold.rejects(one) != threshold.rejects(other)
                for one, other in zip(found, scores[_PYTORCH], strict=True)
            )
            print(
                f"| {category.name} | {name} | {100 * aurocs[name][-1]:.2f}"
                f" | {float(np.abs(values - expected).max()):.2g} | {flips} of {len(tested)} |",
                flush=True,
            )
    for name, values in aurocs.items():
        print(f"| mean | {name} | {100 * statistics.mean(values):.2f} | | |")


if __name__ == "__main__":
    main()
