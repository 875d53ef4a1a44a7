"""Cost of a lane's step by the number of lanes: `python -m benchmarks.trainer_scaling`.

One lane alone is the baseline of every row: `ratio` says how much cheaper a lane's step becomes
in a batch. On a CPU the time is that of its cores, added up, so that other programs on the machine
falsify it less; on a GPU it is that of the clock. `--backbone ViT-B-16` measures with random
weights, which cost what real ones do.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from apt_ray.prompts.lanes import Lane, fold
from apt_ray.prompts.trainer import PromptTrainer
from benchmarks.common import load, sample_bank, sample_images, searched_settings
from benchmarks.rows import Row, compared, write_rows


def main() -> None:
    """Print milliseconds a lane and step for each number of lanes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="builtin", metavar="NAME")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=8, help="steps timed, the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    backbone = load(options.backbone, device=options.device)
    strengths = sorted({settings.noise_strength for settings in searched_settings(64, steps=100)})
    images = sample_images(4)
    bank = sample_bank(backbone, images, strengths=strengths).to(backbone.device)
    clock = time.process_time if backbone.device.type == "cpu" else time.perf_counter
    rows: list[Row] = []
    for count in options.lanes:
        settings = searched_settings(-(-count // 4), steps=100)
        lanes: list[Lane] = [fold(bank, i, s) for s in settings for i in range(4)][:count]
        trainer = PromptTrainer(backbone, lanes)
        trainer.advance(1)
        seconds = []
        for _ in range(options.steps):
            started = clock()
            trainer.advance(1)
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        ours = 1000 * statistics.median(seconds) / count
        alone = rows[0]["baseline"] if rows else ours
        rows.append(
            compared(f"{options.backbone}, {count} lanes", ours, alone, "ms a lane and step")
        )
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
