"""Time per image of a prompt set: `python -m benchmarks.latency SET.safetensors DIR [--json FILE]`.

Decoding is left out; resizing, the backbone's forward pass, the map at the size of the image, the
score and the regions are in.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from apt_ray import Detector, PromptSet, load_backbone, read_image
from apt_ray.data.folders import images_below
from benchmarks.rows import Row, compared, write_rows


def main() -> None:
    """Print the milliseconds per image at each batch size, median over the repetitions."""
    parser = argparse.ArgumentParser(description="Time per image of a prompt set.")
    parser.add_argument("prompt_set", type=Path)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    prompt_set = PromptSet.load(options.prompt_set)
    detector = Detector(load_backbone(prompt_set.backbone), prompt_set)
    paths = images_below(options.images)
    pictures = [read_image(path) for path in paths[: max(options.batch)]]
    rows: list[Row] = []
    for batch in options.batch:
        images = pictures[:batch]
        detector.inspect(images)
        seconds = []
        for _ in range(options.repeat):
            started = time.perf_counter()
            detector.inspect(images)
            seconds.append(time.perf_counter() - started)
        milliseconds = 1000 * statistics.median(seconds) / len(images)
        alone = rows[0]["baseline"] if rows else milliseconds
        rows.append(compared(f"batch {len(images)}", milliseconds, alone, "ms an image"))
    print(
        f"{prompt_set.backbone.name}, {detector.backbone.input_size} px, {options.threads} threads;"
        f" baseline: batch {options.batch[0]}\n"
    )
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
