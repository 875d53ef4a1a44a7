"""Varies the switches of the method one at a time: `python -m benchmarks.ablation`.

Without `--data` the products are generated ones, of kinds of surface and defect that the built-in
backbone was never trained on: what the defaults may be chosen by. With `--data DIR` it reports the
same table on labelled images, which choose nothing. Differences to the defaults are paired over
products and seeds, with their standard error; a second table gives their paired 95 % intervals over
test images and seeds. Writes `--out` after every variant, so that a run that is stopped keeps what
it has.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from apt_ray import find_categories, load_backbone
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category
from apt_ray.files import write_whole
from apt_ray.pretraining.defects import HELD_OUT_DEFECTS
from apt_ray.pretraining.generator import generate
from apt_ray.pretraining.surfaces import HELD_OUT_SURFACES
from apt_ray.validation.evaluation import Result, evaluate
from apt_ray.validation.intervals import change_over_seeds, resample

# What changes in the backbone's spec, and in the settings of the fit.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "attention ordinary": ({"attention": "ordinary"}, {}),
    "attention value_value": ({"attention": "value_value"}, {}),
    "locality_radius 1": ({"locality_radius": 1}, {}),
    "locality_radius 5": ({"locality_radius": 5}, {}),
    "input_size 192": ({"input_size": 192}, {}),
    "tiles 2": ({"tiles": 2}, {}),
    "start random": ({}, {"start": "random"}),
    "start random, smgs off": ({}, {"start": "random", "smgs_weight": 0.0}),
    "smgs off": ({}, {"smgs_weight": 0.0}),
    "smgs 0.5": ({}, {"smgs_weight": 0.5}),
    "smgs penalty": ({}, {"smgs": "penalty"}),
    "not self-optimising": ({}, {"self_optimising": False}),
    "2 anomalous prompts": ({}, {"anomalous_prompts": 2}),
    "3 anomalous prompts": ({}, {"anomalous_prompts": 3}),
    "4 anomalous prompts": ({}, {"anomalous_prompts": 4}),
    "4 anomalous prompts, diversity 1": (
        {},
        {"anomalous_prompts": 4, "diversity_weight": 1.0},
    ),
    "3 anomalous prompts, no diversity": ({}, {"anomalous_prompts": 3, "diversity_weight": 0.0}),
    "margin_weight 1": ({}, {"margin_weight": 1.0}),
    "noise token": ({}, {"noise": "token"}),
    "noise mixed": ({}, {"noise": "mixed"}),
    "region everywhere": ({}, {"region": "everywhere"}),
    "no object mask": ({}, {"object_mask": False}),
    "noise_strength 0.1": ({}, {"noise_strength": 0.1}),
    "noise_strength 0.6": ({}, {"noise_strength": 0.6}),
    "context_length 2": ({}, {"context_length": 2}),
    "context_length 16": ({}, {"context_length": 16}),
    "learning_rate 0.01": ({}, {"learning_rate": 0.01}),
    "learning_rate 0.1": ({}, {"learning_rate": 0.1}),
    "reference_encoder backbone": ({"reference_encoder": "backbone"}, {}),
    "reference_input_size 256": ({"reference_input_size": 256}, {}),
    "reference_input_size 448": ({"reference_input_size": 448}, {}),
    "reference_pool 3": ({"reference_pool": 3}, {}),
    "reference_rotations 4": ({}, {"reference_rotations": 4}),
    "reference_copies 0": ({}, {"reference_copies": 0}),
    "reference_copies 8": ({}, {"reference_copies": 8}),
    "reference_size 256": ({}, {"reference_size": 256}),
    "reference_size 512": ({}, {"reference_size": 512}),
    "reference_size 1024": ({}, {"reference_size": 1024}),
    "reference_weight 0": ({}, {"reference_weight": 0.0}),
    "reference_weight 0.5": ({}, {"reference_weight": 0.5}),
    "reference_weight 0.7": ({}, {"reference_weight": 0.7}),
    "reference_weight 0.95": ({}, {"reference_weight": 0.95}),
    "reference_weight 1": ({}, {"reference_weight": 1.0}),
}
_COLUMNS = (
    ("prompts", "image_auroc"),
    ("prompts", "pixel_auroc"),
    ("reference", "image_auroc"),
    ("reference", "pixel_auroc"),
    ("both", "image_auroc"),
    ("both", "pixel_auroc"),
)
_FIRST_SEED = 2**43

Values = dict[tuple[str, str], NDArray[np.float64]]
"""Of one fit: what is scored and by which metric -> its value on all test images, then on resamples
of them. What the data do not define is left out."""


def main() -> None:
    """Measure every variant and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="labelled products (generated ones)")
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--products", type=int, default=4, help="generated products a surface (4)")
    parser.add_argument("--images", type=int, default=48, help="test images a product (48)")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, help="write the table (Markdown)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            draw_products(Path(folder), options.products, options.images)
        categories = find_categories(options.data or Path(folder), options.categories)
        columns = "prompts image / pixel | reference image / pixel | both image / pixel"
        rows = [f"| variant | {columns} | s a fit and test |", "|---|---|---|---|---|"]
        claims = [f"| variant less defaults (95 % interval) | {columns} |", "|---|---|---|---|"]
        default: list[list[Values]] | None = None
        for name in dict.fromkeys(["defaults", *options.variants]):
            started = time.perf_counter()
            values = _measure(name, categories, options.shots, options.seeds)
            fits = len(categories) * len(options.seeds)
            seconds = (time.perf_counter() - started) / fits
            rows.append(f"| {name} | {_cells(values, default or values)} | {seconds:.1f} |")
            print(rows[-1], flush=True)
            if default is not None:
                claims.append(f"| {name} | {_intervals(values, default)} |")
                print(claims[-1], flush=True)
            default = default or values
            if options.out is not None:
                write_whole(options.out, "\n".join([*rows, "", *claims]) + "\n")


def draw_products(root: Path, products: int, images: int, size: int = 192) -> None:
    """Write generated products of unseen kinds in the MVTec AD layout, with eight normal images
    each and `images` test images, half of them defective."""
    for surface in HELD_OUT_SURFACES:
        for product in range(products):
            count = 8 + images
            pairs = generate(
                _FIRST_SEED + 1000 * product + torch.arange(count),
                size=size,
                surfaces=(surface,),
                defects=tuple(HELD_OUT_DEFECTS),
                defect_rate=0.5,
                product_seeds_P=torch.full((count,), _FIRST_SEED + product),
            )
            folder = root / f"{surface}-{product}"
            for index in range(count):
                is_good = not bool(pairs.mask_PHW[index].any())
                if index < 8:
                    _save(pairs.reference_P3HW[index], folder / "train/good" / f"{index}.png")
                    continue
                kind = "good" if is_good else "defect"
                _save(pairs.query_P3HW[index], folder / "test" / kind / f"{index:03}.png")
                if not is_good:
                    mask_3HW = pairs.mask_PHW[index].expand(3, -1, -1).float()
                    _save(mask_3HW, folder / "ground_truth/defect" / f"{index:03}_mask.png")


def _save(picture_3HW: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture_3HW * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def _measure(
    name: str, categories: Sequence[Category], shots: int, seeds: Sequence[int]
) -> list[list[Values]]:
    """The values of every category, seed by seed."""
    spec, settings = VARIANTS[name]
    backbone = load_backbone(BackboneSpec.parse(spec))
    measured = []
    for category in tqdm(categories, desc=name, leave=False, disable=None):
        results = evaluate(
            category,
            backbone=backbone,
            shots=shots,
            seeds=seeds,
            settings=FitSettings.parse(settings),
        )
        measured.append([_values(results, seed) for seed in seeds])
    return measured


def _values(results: Sequence[Result], seed: int) -> Values:
    return {
        (result.variant, metric): values_R
        for result in results
        if result.seed == seed
        for metric, values_R in resample(result.scores).items()
    }


def _cells(values: list[list[Values]], default: list[list[Values]]) -> str:
    """Means over products and seeds in percent, with the differences to the defaults."""
    cells = []
    for column in _COLUMNS:
        known = [
            (100 * float(ours[column][0]), 100 * float(base[column][0]))
            for by_seed, base_by_seed in zip(values, default, strict=True)
            for ours, base in zip(by_seed, base_by_seed, strict=True)
            if column in ours
        ]
        if not known:
            cells.append("-")
            continue
        differences = [ours - base for ours, base in known]
        cell = f"{fmean(ours for ours, _ in known):.1f}"
        if values is not default and len(differences) > 1:
            error = stdev(differences) / len(differences) ** 0.5
            cell += f" ({fmean(differences):+.1f} ± {error:.1f})"
        cells.append(cell)
    return _paired(cells)


def _intervals(values: list[list[Values]], default: list[list[Values]]) -> str:
    """Differences of the means over the products that define a metric, in percentage points."""
    cells = []
    for column in _COLUMNS:
        before, after = (
            [[row[column] for row in by_seed] for by_seed in rows if column in by_seed[0]]
            for rows in (default, values)
        )
        if not before:
            cells.append("-")
            continue
        change = change_over_seeds(before, after)
        cells.append(
            f"{100 * (change.after - change.before):+.2f}"
            f" ({100 * change.low:+.2f} to {100 * change.high:+.2f})"
        )
    return _paired(cells)


def _paired(cells: Sequence[str]) -> str:
    return " | ".join(" / ".join(cells[i : i + 2]) for i in range(0, len(cells), 2))


if __name__ == "__main__":
    main()
