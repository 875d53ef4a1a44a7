"""Pretrain apt-mini: `python -m apt_ray.pretraining --minutes 20 --out DIR`.

Trains (or goes on from the checkpoint in DIR), fits the constants, measures held-out kinds, and
writes `apt-mini.safetensors`, its digest and `figures.json` into DIR.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from apt_ray.cli.flags import count, number
from apt_ray.features.builtin.apt_mini import save_builtin
from apt_ray.files import write_json
from apt_ray.pretraining.measuring import encode_held_out, fit_constants, measure, state_features
from apt_ray.pretraining.settings import TrainSettings
from apt_ray.pretraining.surfaces import BOARD_LIKE, SOLAR_LIKE
from apt_ray.pretraining.train import Pretraining, train

_FIT_SEED, _MEASURE_SEED = 2**40, 2**41


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m apt_ray.pretraining", description=__doc__)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=number(float), help="length of the training in minutes")
    length.add_argument("--steps", type=count, help="length of the training in steps (repeatable)")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and weights")
    parser.add_argument("--seed", type=number(int), default=0)
    parser.add_argument("--batch-pairs", type=count, default=16, help="pairs of pictures a step")
    parser.add_argument(
        "--from",
        dest="start",
        choices=("scratch", "shipped"),
        default="scratch",
        help="random weights, or go on from those that the package holds",
    )
    parser.add_argument(
        "--leave-out",
        nargs="*",
        default=(),
        metavar="KIND",
        help=f"kinds of surface never shown, such as {' '.join(BOARD_LIKE + SOLAR_LIKE)}",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=(),
        metavar="NAME=VALUE",
        help="any other setting, such as pooled_weight=0",
    )
    parser.add_argument(
        "--held-out-pairs", type=count, default=512, help="pairs to fit and measure"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    settings = TrainSettings(
        minutes=options.minutes,
        steps=options.steps,
        seed=options.seed,
        batch_pairs=options.batch_pairs,
        start=options.start,
        left_out=tuple(options.leave_out),
        **{name: json.loads(value) for name, value in (item.split("=", 1) for item in options.set)},
    )
    run = train(
        settings,
        options.out,
        device=options.device,
        report=lambda line: print(line, flush=True),
    )
    export(run, options.out, pairs=options.held_out_pairs)


def export(run: Pretraining, folder: Path, *, pairs: int) -> None:
    """Fit the constants on some held-out pairs and write the weights; then measure on others."""
    model = run.trained_model().eval()
    states_2E = state_features(model, run.vocabulary)
    constants = fit_constants(encode_held_out(model, pairs=pairs, seed=_FIT_SEED), states_2E)
    path = save_builtin(model, run.trained_ids, constants, folder)
    print(f"wrote {path}\n{constants}", flush=True)
    figures = measure(encode_held_out(model, pairs=pairs, seed=_MEASURE_SEED), states_2E, constants)
    report = {"steps": run.steps_done, "minutes": run.seconds / 60, **asdict(figures)}
    write_json(folder / "figures.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
