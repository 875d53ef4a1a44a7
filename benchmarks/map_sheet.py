"""Draws maps to look at: `python -m benchmarks.map_sheet DIR CATEGORY --out sheet.png`.

A row for each test image (some of every defect type, good ones too): the image, the maps of the
prompts, of the reference and of both, each scaled to its own category's range, and the truth.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw

from apt_ray import Detector, find_categories, fit, load_backbone, read_image
from apt_ray.config import BackboneSpec
from apt_ray.images import read_mask

_SIDE = 160


def main() -> None:
    """Fit on four shots, score and draw."""
    parser = argparse.ArgumentParser(description="Draw images beside their maps and the truth.")
    parser.add_argument("data", type=Path)
    parser.add_argument("category")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-type", type=int, default=3, help="images of each defect type (3)")
    parser.add_argument("--input-size", type=int, help="pixels a side (the model's native size)")
    options = parser.parse_args()

    (category,) = find_categories(options.data, [options.category])
    backbone = load_backbone(BackboneSpec(input_size=options.input_size))
    support = category.support_set(4, seed=0)
    detector = Detector(backbone, fit(category.name, support, backbone=backbone))
    types = sorted({image.defect_type for image in category.test})
    chosen = [
        image
        for name in types
        for image in [one for one in category.test if one.defect_type == name][: options.per_type]
    ]
    pictures = [read_image(image.path) for image in chosen]
    features = backbone.encode_in_batches(backbone.preprocess(pictures))
    columns, scores = [], []
    for weight in (0.0, 1.0, None):
        maps_BHW, scores_B = detector.score(features, reference_weight=weight)
        high = torch.quantile(maps_BHW.flatten()[::7], 0.999)
        columns.append(colormaps["inferno"]((maps_BHW / high).clamp(0, 1).numpy())[..., :3])
        scores.append(scores_B.tolist())
    sheet = Image.new("RGB", (5 * _SIDE, len(chosen) * (_SIDE + 12)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (image, picture) in enumerate(zip(chosen, pictures, strict=True)):
        top = row * (_SIDE + 12)
        maps = [Image.fromarray((column[row] * 255).astype(np.uint8)) for column in columns]
        truth = (
            Image.fromarray(read_mask(image.mask, picture.size).astype(np.uint8) * 255)
            if image.mask
            else Image.new("L", (1, 1), 0)
        )
        for place, cell in enumerate((picture, *maps, truth)):
            shown = cell.convert("RGB").resize((_SIDE - 2, _SIDE))
            sheet.paste(shown, (place * _SIDE, top + 12))
        values = ", ".join(f"{column[row]:.3f}" for column in scores)
        pen.text((2, top), f"{image.defect_type}/{image.path.name}: {values}", fill="black")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
