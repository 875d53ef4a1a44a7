"""`apt-ray inspect`: images in, verdicts out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from apt_ray.cli.common import add_command
from apt_ray.files import write_json, writing


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = add_command(commands, "inspect", _run, "look for defects in images")
    inspect.add_argument("prompt_set", type=Path, help="file that `fit` wrote")
    inspect.add_argument("images", type=Path, nargs="+", help="images, or folders of images")
    inspect.add_argument("--out", type=Path, help="folder for overlay images")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    inspect.add_argument("--device", default="cpu", help="torch device (cpu)")


def _run(options: argparse.Namespace) -> int:
    from apt_ray.detection.detector import Detector
    from apt_ray.detection.prompt_set import PromptSet
    from apt_ray.features.clip import load_backbone
    from apt_ray.images import draw_overlay, read_image

    paths = _images(options.images)
    prompt_set = PromptSet.load(options.prompt_set)
    detector = Detector(load_backbone(prompt_set.backbone, device=options.device), prompt_set)
    rows = []
    for path in tqdm(paths, desc="inspecting", leave=False, disable=None):
        image = read_image(path)
        (inspection,) = detector.inspect([image])
        verdict = "ANOMALOUS" if inspection.is_anomalous else "normal"
        p_value = "" if inspection.p_value is None else f"  p {inspection.p_value:.3f}"
        tqdm.write(
            f"{verdict:9}  score {inspection.anomaly_score:.4f}"
            f"  threshold {inspection.threshold:.4f}{p_value}  {path}"
        )
        row = {
            "image": str(path),
            "category": prompt_set.category,
            "anomaly_score": inspection.anomaly_score,
            "threshold": inspection.threshold,
            "is_anomalous": inspection.is_anomalous,
            "p_value": inspection.p_value,
        }
        if options.out is not None:
            overlay = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
            target = options.out / f"{path.parent.name}-{path.stem}.png"
            with writing(target) as place:
                overlay.save(place, format="PNG")
            row["overlay"] = str(target)
        rows.append(row)
    if options.json is not None:
        write_json(options.json, rows)
    return 0


def _images(paths: Sequence[Path]) -> list[Path]:
    from apt_ray.errors import DataError
    from apt_ray.images import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
            )
        else:
            found.append(path)
    if not found:
        raise DataError(f"no image in {', '.join(map(str, paths))}: give files or other folders")
    return found
