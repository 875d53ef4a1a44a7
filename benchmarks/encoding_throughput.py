"""Images a second of a vision tower: `python -m benchmarks.encoding_throughput --device cuda`.

Random weights, which cost what real ones do. The ceiling is the speed of a large product of
matrices of the same precision, measured in the same run; `ratio` is the share of it that encoding
reaches, counting the operations of products and attention alone.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from apt_ray.config import Precision
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from benchmarks.common import median_seconds, random_weights
from benchmarks.rows import Row, compared, write_rows

_SIDES = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    """Print operations a second of encoding beside those of the ceiling, and images a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["ViT-L-14-336", "ViT-B-16-plus-240"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--precision", nargs="+", choices=get_args(Precision), default=list(get_args(Precision))
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    device = torch.device(options.device)
    ceilings = {name: _ceiling(name, device) for name in options.precision}
    rows: list[Row] = []
    for name in options.backbones:
        with TemporaryDirectory() as folder:
            spec = random_weights(name, Path(folder))
            for precision in options.precision:
                backbone = load_backbone(
                    spec.model_copy(update={"precision": precision}), device=options.device
                )
                rows += [
                    _row(backbone, batch, ceilings[precision], options.repeats)
                    for batch in options.batch
                ]
    print("ours: encoding; baseline: the ceiling\n")
    write_rows(rows, options.json)


def _row(backbone: Backbone, batch: int, ceiling: float, repeats: int) -> Row:
    size = backbone.input_size
    pixels_B3HW = torch.rand(batch, 3, size, size, device=backbone.device)
    with FlopCounterMode(display=False) as counter:
        backbone.encode_images(pixels_B3HW)
    seconds = median_seconds(
        lambda: backbone.encode_images(pixels_B3HW), backbone.device, repeats, warm_ups=2
    )
    speed = counter.get_total_flops() / seconds
    return compared(
        f"{backbone.spec.name}, {backbone.spec.precision}, batch {batch}:"
        f" {batch / seconds:.0f} images/s",
        speed / 1e12,
        ceiling / 1e12,
        "TFLOP/s",
        more_is_better=True,
    )


def _ceiling(precision: Precision, device: torch.device) -> float:
    """Operations a second of a large product of random matrices."""
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in "ab")
    return 2 * side**3 / median_seconds(lambda: a @ b, device, 10, warm_ups=2)


if __name__ == "__main__":
    main()
