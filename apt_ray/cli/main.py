"""The command line for all that needs no cluster: `apt-ray`, or `python -m apt_ray`.

Each command is a module of this folder, which adds its parser and runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import apt_ray
from apt_ray.cli import compare, evaluate, export, fit, inspect, plan, registry, sample
from apt_ray.cli.common import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a clear error, 2 wrong usage, 130
    interrupted, 141 its reader went away."""
    options = _parser().parse_args(arguments)
    return run(lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apt-ray",
        description="Find defects in images of products, from a handful of normal images.",
        epilog="Start with `apt-ray sample --out data`, then"
        " `apt-ray fit --data data/washer --out washer.safetensors`.",
    )
    parser.add_argument("--version", action="version", version=f"apt-ray {apt_ray.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (sample, fit, inspect, evaluate, compare, export, plan, registry):
        module.add_to(commands)
    return parser
