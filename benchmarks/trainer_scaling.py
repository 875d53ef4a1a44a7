"""Cost of a lane's step by the number of lanes: `python -m benchmarks.trainer_scaling`.

One lane alone is the baseline of every row: `ratio` says how much cheaper a lane's step becomes
in a batch. With `--against DIR`, another checkout of this repository, the baseline is what the same
lanes cost there, in a process beside, the two taking turns; so a busy machine does not matter much.

On a CPU the time is that of its cores, added up, so that other programs on the machine falsify it
less; on a GPU it is that of the clock. `--backbone ViT-B-16` measures with random weights, which
cost what real ones do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from apt_ray.prompts.lanes import Lane, fold
from apt_ray.prompts.trainer import PromptTrainer
from benchmarks.common import load, sample_bank, sample_images, searched_settings
from benchmarks.rows import Row, compared, write_rows

_STEPS_A_TURN = 4


def main() -> None:
    """Print milliseconds a lane and step for each number of lanes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="builtin", metavar="NAME")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 12, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=8, help="steps timed, the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    if options.against:
        rows = [_against(options, count) for count in options.lanes]
        write_rows(rows, options.json)
        return
    steps_of = _trainers(options)
    if options.answer:
        steps = steps_of(options.lanes[0])
        for line in sys.stdin:
            print(*steps(int(line)), flush=True)
        return
    rows = []
    for count in options.lanes:
        ours = 1000 * statistics.median(steps_of(count)(options.steps)) / count
        alone = rows[0]["baseline"] if rows else ours
        rows.append(compared(_name(options, count), ours, alone, "ms a lane and step"))
    write_rows(rows, options.json)


def _trainers(options: argparse.Namespace) -> Callable[[int], Callable[[int], list[float]]]:
    """A number of lanes -> what trains them for some steps and says the seconds of each."""
    torch.set_num_threads(options.threads)
    backbone = load(options.backbone, device=options.device)
    strengths = sorted({settings.noise_strength for settings in searched_settings(64, steps=100)})
    bank = sample_bank(backbone, sample_images(4), strengths=strengths).to(backbone.device)
    clock = time.process_time if backbone.device.type == "cpu" else time.perf_counter

    def of(count: int) -> Callable[[int], list[float]]:
        settings = searched_settings(-(-count // 4), steps=100)
        lanes: list[Lane] = [fold(bank, i, s) for s in settings for i in range(4)][:count]
        trainer = PromptTrainer(backbone, lanes)
        trainer.advance(1)

        def step() -> float:
            started = clock()
            trainer.advance(1)
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - started

        return lambda steps: [step() for _ in range(steps)]

    return of


def _against(options: argparse.Namespace, count: int) -> Row:
    """Both checkouts, each with a process of its own that waits while the other computes."""
    given = ("--backbone", options.backbone, "--device", options.device)
    command = [sys.executable, __file__, "--answer", *given, "--lanes", str(count)]
    seconds: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, "--threads", str(options.threads)],
                    env=os.environ | {"PYTHONPATH": str(folder)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for folder in (Path(__file__).parents[1], options.against.resolve())
        ]
        for turn in range(-(-options.steps // _STEPS_A_TURN)):
            for side in (0, 1) if turn % 2 else (1, 0):
                seconds[side].extend(_ask(processes[side], _STEPS_A_TURN))
    ours, theirs = (1000 * statistics.median(each) / count for each in seconds)
    return compared(_name(options, count), ours, theirs, "ms a lane and step")


def _ask(process: "subprocess.Popen[str]", steps: int) -> Sequence[float]:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return [float(word) for word in process.stdout.readline().split()]


def _name(options: argparse.Namespace, count: int) -> str:
    return f"{options.backbone}, {count} lanes"


if __name__ == "__main__":
    main()
