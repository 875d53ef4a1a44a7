"""`apt-ray sample`: product categories to try things on."""

from __future__ import annotations

import argparse
from pathlib import Path

from apt_ray.cli.common import add_command, bar
from apt_ray.cli.flags import number
from apt_ray.files import check_writable


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sample = add_command(
        commands, "sample", _run, "draw three product categories with defects to try things on"
    )
    sample.add_argument("--out", type=Path, required=True, help="folder to create")
    sample.add_argument("--seed", type=number(int), default=0, help="other seeds draw other images")


def _run(options: argparse.Namespace) -> int:
    check_writable(options.out, is_folder=True)
    from apt_ray.data.samples.factory import write_samples

    with bar("drawing") as progress:
        folders = write_samples(options.out, seed=options.seed, progress=progress)
    for folder in folders:
        print(folder)
    return 0
