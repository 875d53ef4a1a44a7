"""`apt-ray evaluate`: figures on labelled test images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from apt_ray.cli.common import (
    WriteJson,
    add_backbone,
    add_command,
    add_json,
    add_settings,
    backbone,
    settings,
    writing_json,
)
from apt_ray.cli.flags import count, seeds
from apt_ray.errors import AptError, WriteError
from apt_ray.files import check_writable, keep, location

if TYPE_CHECKING:
    from apt_ray.features.protocol import Backbone
    from apt_ray.validation.evaluation import Result

_TWO_KINDS = 2
_EXAMPLES = 4  # good and defective images of each kind that a report shows


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = add_command(
        commands, "evaluate", _run, "measure on labelled test images, over several seeds"
    )
    evaluate.add_argument(
        "--data",
        type=location,
        required=True,
        help="folder of products, or s3://bucket/prefix, in MVTec AD, VisA or plain layout",
    )
    evaluate.add_argument(
        "--categories", nargs="+", default=[], metavar="NAME", help="only these products"
    )
    evaluate.add_argument("--shots", type=count, default=4, help="support images a fit (4)")
    evaluate.add_argument(
        "--seeds", type=seeds, default=(0, 1, 2), help="comma-separated seeds (0,1,2)"
    )
    evaluate.add_argument(
        "--calibrate",
        type=count,
        default=0,
        metavar="N",
        help="set each threshold from N normal images that are neither learned from nor tested;"
        " 19 certify a false-alarm rate of 5%% (none: estimated from the support images)",
    )
    evaluate.add_argument(
        "--confirm",
        type=count,
        default=0,
        metavar="N",
        help="let N defective images of each kind, which are not tested, teach the kinds of"
        " defects, and print what the others are called",
    )
    add_json(evaluate, "write every result as JSON")
    evaluate.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="write the scores of every image (.npz), for `compare`",
    )
    evaluate.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a page with tables, curves and images with their maps to DIR/index.html",
    )
    add_settings(evaluate)
    add_backbone(evaluate)


def _run(options: argparse.Namespace) -> int:
    with writing_json(options.json) as write:
        return _evaluate(options, write)


def _evaluate(options: argparse.Namespace, write_json: WriteJson) -> int:
    check_writable(options.scores)
    check_writable(options.report, is_folder=True)
    from apt_ray.data.distinct import describe_copies
    from apt_ray.data.folders import find_categories
    from apt_ray.validation.evaluation import evaluate

    if options.report is not None:
        # Before the work of hours: what draws it may not be installed.
        import apt_ray.validation.report  # noqa: F401
    categories = find_categories(options.data, options.categories)
    for category in categories:
        print(category.contents)
    loaded = backbone(options)
    results: list[Result] = []
    failed = False
    try:
        for category in categories:
            try:
                with tqdm(leave=False, disable=None) as bar:

                    def show(what: str, done: int, total: int, bar: tqdm[None] = bar) -> None:
                        bar.set_description(f"{category.name}: {what}", refresh=False)  # noqa: B023
                        bar.total, bar.n = total, done
                        bar.refresh()

                    found = evaluate(
                        category,
                        backbone=loaded,
                        shots=options.shots,
                        seeds=options.seeds,
                        settings=settings(options),
                        calibration=options.calibrate,
                        confirmed=options.confirm,
                        examples=_EXAMPLES if options.report is not None else 0,
                        progress=show,
                    )
                results += found
                copies = tuple(dict.fromkeys(copy for result in found for copy in result.copies))
                if copies:
                    said = describe_copies(copies)
                    print(f"warning: {category.name}: {said}", file=sys.stderr)
            except AptError as error:
                # The other categories are still worth their figures.
                failed = True
                print(f"error: {error}", file=sys.stderr)
    finally:
        # Also when it is interrupted: whole categories took their time.
        failed |= not _write(options, results, loaded, write_json)
        _print(results)
    return 1 if failed else 0


def _write(
    options: argparse.Namespace,
    results: list[Result],
    loaded: Backbone,
    write_json: WriteJson,
) -> bool:
    """Write the files that were asked for; whether all could be, each where it should."""
    from apt_ray.validation.intervals import save_scores

    def report(folder: Path) -> None:
        from apt_ray.validation.report.html import write_report

        page = write_report(folder, results, backbone=loaded, settings=settings(options))
        print(f"report: {page}\n")

    rows = [result.as_dict() for result in results]
    scores = [result.scores for result in results]
    writers: list[Callable[[], None]] = []
    if results and options.scores is not None:
        writers.append(partial(keep, options.scores, partial(save_scores, scores=scores)))
    if results and options.report is not None:
        writers.append(partial(keep, options.report, report))
    # The last, for who reads it may go away.
    writers.append(partial(write_json, rows))
    is_whole = True
    for write in writers:
        try:
            write()
        except WriteError as error:
            is_whole = False
            print(f"error: {error}", file=sys.stderr)
    return is_whole


def _print(results: list[Result]) -> None:
    from apt_ray.validation.evaluation import format_table
    from apt_ray.validation.intervals import format_types
    from apt_ray.validation.naming import format_confusion

    if results:
        print(format_table(results))
    scores = [result.scores for result in results]
    if any(len(set(one.defect_types)) > _TWO_KINDS for one in scores):
        print(f"\n{format_types(scores)}")
    if named := [result.named for result in results if result.named is not None]:
        print(f"\n{format_confusion(named)}")
