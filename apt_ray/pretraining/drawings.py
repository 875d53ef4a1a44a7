"""Pictures of the generator and of a run, for people.

`python -m apt_ray.pretraining.drawings sheet --out docs/generator.jpg` draws every kind of surface
and defect; `... curve RUN/curve.jsonl --out docs/pretraining-curve.png` draws the loss of a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from apt_ray.cli import flags
from apt_ray.pretraining.defects import DEFECTS, HELD_OUT_DEFECTS
from apt_ray.pretraining.generator import Pairs, generate
from apt_ray.pretraining.surfaces import HELD_OUT_SURFACES, SURFACES

_LABEL_HEIGHT = 13
_COLUMNS = 3
_TERMS = ("dense", "reference", "heads", "image", "pooled", "phrases")


def contact_sheet(*, size: int = 80, pairs: int = 3, seed: int = 0) -> Image.Image:
    """Every kind with `pairs` examples: reference, query, and the query with its mask outlined."""
    cells = []
    for number, name in enumerate(SURFACES):
        seeds = seed + 100 * number + torch.arange(pairs)
        drawn = generate(seeds, size=size, surfaces=(name,), defect_rate=1.0)
        cells.append(_cell("surface", name, name in HELD_OUT_SURFACES, drawn))
    for number, name in enumerate(DEFECTS):
        seeds = seed + 100 * number + torch.arange(pairs)
        drawn = generate(seeds, size=size, defects=(name,), defect_rate=1.0)
        cells.append(_cell("defect", name, name in HELD_OUT_DEFECTS, drawn))
    width, height = cells[0].size
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (width + 6), rows * (height + 2)), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(cell, (column * (width + 6), row * (height + 2)))
    return sheet


def draw_curve(path: Path) -> Figure:
    """The terms of the loss over the steps, each smoothed over a twentieth of the run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    window = max(1, len(lines) // 20)
    kernel = np.ones(window) / window
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.array([line["step"] for line in lines])
    for name in _TERMS:
        values = np.array([line[name] for line in lines])
        axes.plot(
            np.convolve(steps, kernel, mode="valid"),
            np.convolve(values, kernel, mode="valid"),
            label=name,
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(ncols=3)
    axes.grid(alpha=0.3)
    return figure


def _cell(kind: str, name: str, is_held_out: bool, pairs: Pairs) -> Image.Image:
    title = f"{kind}: {name}{' (held out)' if is_held_out else ''}"
    outlined_P3HW = _outline(pairs.query_P3HW, pairs.mask_PHW)
    row_3HW = torch.cat(
        [
            picture
            for triple in zip(pairs.reference_P3HW, pairs.query_P3HW, outlined_P3HW, strict=True)
            for picture in triple
        ],
        dim=2,
    )
    pixels = (row_3HW.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    cell = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + _LABEL_HEIGHT), "white")
    cell.paste(Image.fromarray(pixels), (0, _LABEL_HEIGHT))
    ImageDraw.Draw(cell).text((2, 0), title, fill="black")
    return cell


def _outline(query_P3HW: Tensor, mask_PHW: Tensor) -> Tensor:
    wide_PHW = F.max_pool2d(mask_PHW[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    edge_P1HW = (wide_PHW & ~mask_PHW)[:, None]
    red = torch.tensor((1.0, 0.0, 0.0))[:, None, None]
    return torch.where(edge_P1HW, red, query_P3HW)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m apt_ray.pretraining.drawings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="draw every kind of surface and defect")
    sheet.add_argument("--seed", type=flags.number(int), default=0)
    curve = commands.add_parser("curve", help="draw the loss of a run")
    curve.add_argument("curve", type=Path, help="the run's curve.jsonl")
    for command in (sheet, curve):
        command.add_argument("--out", type=Path, required=True, help="picture to write")
    options = parser.parse_args(arguments)
    if options.command == "sheet":
        contact_sheet(seed=options.seed).save(options.out)
    else:
        draw_curve(options.curve).savefig(options.out, dpi=100)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
