"""`apt-ray compare`: is one evaluation better than another by more than chance?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from apt_ray.cli.common import WriteJson, add_command, add_json, writing_json


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = add_command(
        commands, "compare", _run, "say whether one evaluation is better than another"
    )
    compare.add_argument("before", type=Path, help="file of `evaluate --scores`")
    compare.add_argument("after", type=Path, help="another, of the same test images")
    add_json(compare, "write the differences as JSON")


def _run(options: argparse.Namespace) -> int:
    with writing_json(options.json) as write:
        return _compare(options, write)


def _compare(options: argparse.Namespace, write: WriteJson) -> int:
    from apt_ray.validation.intervals import compare, format_differences, in_one_only, load_scores

    before, after = load_scores(options.before), load_scores(options.after)
    differences = compare(before, after)
    print(format_differences(differences))
    for left_out in in_one_only(before, after):
        print(f"not compared: {left_out}", file=sys.stderr)
    write([asdict(difference) for difference in differences])
    return 0
