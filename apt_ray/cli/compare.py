"""`apt-ray compare`: is one evaluation better than another by more than chance?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from apt_ray.cli.common import add_command
from apt_ray.files import check_writable, keep, write_json


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = add_command(
        commands, "compare", _run, "say whether one evaluation is better than another"
    )
    compare.add_argument("before", type=Path, help="file of `evaluate --scores`")
    compare.add_argument("after", type=Path, help="another, of the same test images")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the differences as JSON")


def _run(options: argparse.Namespace) -> int:
    check_writable(options.json)
    from apt_ray.validation.intervals import compare, format_differences, in_one_only, load_scores

    before, after = load_scores(options.before), load_scores(options.after)
    differences = compare(before, after)
    print(format_differences(differences))
    for left_out in in_one_only(before, after):
        print(f"not compared: {left_out}", file=sys.stderr)
    if options.json is not None:
        rows = [asdict(difference) for difference in differences]
        keep(options.json, partial(write_json, value=rows))
    return 0
