"""Inspect millions of images, as a Ray job: a row of Parquet for each.

    ray job submit --working-dir . -- python serving/batch.py --category bottle \\
        --input s3://line/images --output s3://line/inspected

Exit code: 0 if every image has a verdict, 1 if some could not be read or the batch ended early (run
it again: what is finished is not done again), 2 for a wrong command line.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt_ray.cli.common import run
from apt_ray.cli.flags import count, number
from apt_ray.errors import SettingsError
from apt_ray.machine import settle
from apt_ray.optional import require

if TYPE_CHECKING:
    from serving.bulk.pipeline import Run
    from serving.bulk.versions import Version

# Ray, PyTorch and MLflow are imported inside, so that `--help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect a batch from the command line; returns the exit code."""
    options = _read_command(arguments)
    settle()
    return run(lambda: _inspect(options))


def _read_command(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; SystemExit with status 2 if it is wrong, after saying why."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.category or options.category_column or options.prompt_set):
        parser.error("give --category, --category-column or --prompt-set")
    if options.category and options.category_column:
        parser.error("give --category or --category-column, not both")
    if options.prompt_set and (options.category_column or options.version or options.alias):
        parser.error("--prompt-set is a file of one category: it has no column, version or alias")
    return options


def _inspect(options: argparse.Namespace) -> int:
    require("ray", "pyarrow", "pandas", "mlflow", extra="serve")
    if any(place.startswith("s3://") for place in [*options.input, options.output]):
        require("boto3", extra="s3")

    from serving.bulk.inputs import find_inputs
    from serving.bulk.pipeline import Asked, inspect_all
    from serving.bulk.results import Output, add_tallies
    from serving.bulk.summary import closing_lines, summary

    output = Output.at(options.output)
    output.check_writable()
    output.check_apart(options.input)
    category = options.category
    if options.prompt_set:
        from serving.bulk.versions import category_of

        category = category or category_of(options.prompt_set)
    _say(f"looking for images in {', '.join(options.input)}")
    inputs = find_inputs(
        options.input,
        category=category,
        category_column=options.category_column,
        path_column=options.path_column,
    )
    categories = sorted({each.category for each in inputs})
    versions = _versions(options, categories, category)
    for version in versions.values():
        _say(f"{version.category}: {_described(version)}")
    output.check(versions)
    if options.retry_errors and not options.dry_run:
        _say(f"{output.forget_errors():,} images that could not be read are tried again")
    finished, tallies = output.finished()
    left = [each for each in inputs if each.key not in finished]
    _say(f"{len(inputs):,} images, {len(inputs) - len(left):,} of them finished before")
    left = left[: options.limit]
    if options.dry_run:
        _say(f"{len(left):,} images would be inspected")
        return 0
    output.begin(versions)
    ran: Run | None = None
    if left:
        _connect(options.ray_address)
        asked = Asked(
            actors=options.actors,
            threads=options.cpus_per_actor,
            gpus=options.gpus_per_actor,
            batch_size=options.batch_size,
            block_images=options.block_images,
            runtime=options.runtime,
        )
        resources = asked.of_cluster()
        _say(
            f"{resources.actors} actors of"
            f" {f'{resources.gpus:g} GPUs' if resources.gpus else f'{resources.threads} threads'},"
            f" batches of {resources.batch_size}, {resources.decoders} decoders,"
            f" {resources.writers} writers, blocks of"
            f" {resources.block_images} images"
        )
        ran = inspect_all(left, versions, output, resources, overlays=options.overlays, say=_say)
        add_tallies(tallies, ran.tallies)
    output.write_summary(summary(tallies, ran))
    print("\n" + "\n".join(closing_lines(tallies, ran)) + "\n", flush=True)
    _say(f"the rows lie in {output.folder}/inspections")
    lost = ran.lost if ran else []
    if lost:
        print(
            f"error: {len(lost):,} images were given up, for their processes died again and again"
            f" (first {lost[0].source}): see Ray's logs for why, then run the same command again",
            file=sys.stderr,
        )
    unreadable = sum(tally.unreadable for tally in tallies.values())
    if unreadable:
        print(
            f"error: {unreadable:,} images could not be read: see the column `error`; once they"
            f" can, run the same command with --retry-errors",
            file=sys.stderr,
        )
    return 1 if lost or unreadable else 0


def _versions(
    options: argparse.Namespace, categories: Sequence[str], category: str | None
) -> "dict[str, Version]":
    from apt_ray.registry import open_registry
    from serving.bulk.versions import read_numbers, versions_of
    from serving.settings import Fleet

    numbers = read_numbers(options.version, category)
    unknown = sorted(set(numbers) - set(categories))
    if unknown:
        raise SettingsError(f"--version {unknown[0]}: no image is of this category")
    registry = None
    if not options.prompt_set:
        registry = open_registry(options.mlflow)
        registry.check()
    return versions_of(
        categories,
        registry=registry,
        prompt_set=options.prompt_set,
        numbers=numbers,
        alias=options.alias,
        fleet=Fleet.read(options.fleet) if options.fleet else None,
    )


def _described(version: "Version") -> str:
    threshold = version.prompt_set.threshold.value
    name = "a file" if version.number is None else f"version {version.number}"
    return f"{name}, threshold {threshold:.4f}"


def _connect(address: str | None) -> None:
    """Connect to Ray; SettingsError if there is none."""
    address = address or os.environ.get("RAY_ADDRESS")
    remedy = (
        "start Ray with `ray start --head` and submit the batch to it with `ray job submit`, or"
        " pass --ray-address local for a Ray of its own on this machine"
    )
    import ray

    if ray.is_initialized():
        return
    if not address:
        raise SettingsError(f"there is no Ray to run on, RAY_ADDRESS is not set: {remedy}")
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # a Ray that does not start in time raises nothing else
        raise SettingsError(f"cannot connect to Ray at {address} ({error}): {remedy}") from error


def _say(line: str) -> None:
    """One line of the log, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serving/batch.py",
        description="Inspect the images of folders, archives and lists on a Ray cluster, and write"
        " a row of Parquet for each. A batch that was cut off goes on where it was: run the same"
        " command again.",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="folder of images or of tar archives in WebDataset's layout, an archive, or a Parquet"
        " file with a column of paths; the same absolute path on every node, or s3://bucket/prefix",
    )
    images.add_argument("--category", metavar="NAME", help="of all images")
    images.add_argument(
        "--category-column",
        metavar="NAME",
        help="column of the Parquet file, or key in an archive's JSON files, that names the"
        " category of each image",
    )
    images.add_argument(
        "--path-column",
        default="path",
        metavar="NAME",
        help="column of the Parquet file that holds the paths (%(default)s)",
    )
    images.add_argument(
        "--limit", type=count, metavar="N", help="inspect no more than so many images in this run"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder, on a cluster one that all nodes share, or s3://bucket/prefix",
    )
    results.add_argument(
        "--overlays",
        choices=("none", "rejects", "all"),
        default="none",
        help="draw the images with their anomaly maps (%(default)s)",
    )
    results.add_argument(
        "--retry-errors",
        action="store_true",
        help="inspect again what could not be read in earlier runs",
    )
    results.add_argument(
        "--dry-run", action="store_true", help="inspect nothing: check, count, and say so"
    )
    versions = parser.add_argument_group("versions")
    versions.add_argument(
        "--version",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="version in the registry, of a category where there are several (the champion)",
    )
    versions.add_argument("--alias", metavar="NAME", help="alias in the registry (champion)")
    versions.add_argument(
        "--prompt-set", type=Path, metavar="FILE", help="file that `fit` wrote; asks no registry"
    )
    versions.add_argument(
        "--fleet",
        type=Path,
        metavar="FILE",
        help="fleet file whose versions, thresholds and regions of interest hold, below what"
        " operators have set",
    )
    versions.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow server that is the registry (MLFLOW_TRACKING_URI)",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster, or 'local' for one of its own (RAY_ADDRESS, which a job has)",
    )
    cluster.add_argument(
        "--actors", type=count, metavar="N", help="that hold the model (as many as fit)"
    )
    cluster.add_argument(
        "--cpus-per-actor",
        type=count,
        metavar="N",
        help="threads of an actor without a GPU (4, or all of a smaller node)",
    )
    cluster.add_argument(
        "--gpus-per-actor",
        type=number(float),
        metavar="N",
        help="GPUs of an actor (1 where the cluster has some, else 0)",
    )
    cluster.add_argument(
        "--runtime",
        choices=("auto", "torch", "openvino"),
        default="auto",
        help="what encodes images on CPUs, as in a fleet file (%(default)s: OpenVINO where it gives"
        " the same features)",
    )
    cluster.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help="images of one forward pass (64 on GPUs, else 8)",
    )
    cluster.add_argument(
        "--block-images",
        type=count,
        default=256,
        metavar="N",
        help="images of a block, which has one file, and is what a killed process costs"
        " (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
