"""Draws the README's image: `python -m benchmarks.example docs/example.png`.

A defective sample part, its anomaly map over it, and the ground truth. The images are drawn by
the sample factory, the prompt set is fitted to four good ones.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from apt_ray import Detector, draw_overlay, find_categories, fit, load_backbone, read_image
from apt_ray.data.samples.factory import write_samples
from apt_ray.images import read_mask

_SIDE = 320
_GAP = 8


def main() -> None:
    """Fit, inspect and draw."""
    parser = argparse.ArgumentParser(description="Draw the README's image.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--category", default="textile")
    parser.add_argument("--index", type=int, default=0, help="which of the defective images")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder))
        (category,) = find_categories(Path(folder), [options.category])
        backbone = load_backbone()
        support = category.support_set(4, seed=0)
        detector = Detector(backbone, fit(category.name, support, backbone=backbone))
        defective = [image for image in category.test if image.is_anomalous][options.index]
        image = read_image(defective.path)
        (inspection,) = detector.inspect([image])
        assert defective.mask is not None
        truth = Image.fromarray(read_mask(defective.mask, image.size).astype(np.uint8) * 255)
        overlay = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
    sheet = Image.new("RGB", (3 * _SIDE + 2 * _GAP, _SIDE), "white")
    for place, picture in enumerate((image, overlay, truth)):
        sheet.paste(picture.convert("RGB").resize((_SIDE, _SIDE)), (place * (_SIDE + _GAP), 0))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, optimize=True)
    print(f"{options.out}: {defective.defect_type}, score {inspection.anomaly_score:.3f},", end=" ")
    print(f"threshold {inspection.threshold:.3f}")


if __name__ == "__main__":
    main()
