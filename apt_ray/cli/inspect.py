"""`apt-ray inspect`: images or one video in, verdicts or events out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from apt_ray.cli import stream
from apt_ray.cli.common import WriteJson, add_command, add_json, writing_json
from apt_ray.errors import DataError, ImageError, SettingsError, WriteError
from apt_ray.files import check_writable, is_within, writing
from apt_ray.text import printable

if TYPE_CHECKING:
    from apt_ray.detection.detector import Detector
    from apt_ray.export.exported import ExportedDetector


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = add_command(commands, "inspect", _run, "look for defects in images")
    inspect.add_argument("prompt_set", type=Path, help="file that `fit` or `export` wrote")
    inspect.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="images, or folders of images; or one video: a video file, an animated GIF, or - for a"
        " pipe of JPEG and PNG files",
    )
    inspect.add_argument(
        "--out",
        type=Path,
        help="folder for overlay images: NAME.png for each NAME, as they lie; of a video its"
        " events, scores, timeline, and overlays of the worst frames",
    )
    add_json(inspect, "write the results as JSON")
    inspect.add_argument("--device", default="cpu", help="torch device (cpu)")
    stream.add_flags_to(inspect)


def _run(options: argparse.Namespace) -> int:
    check_writable(options.out, is_folder=True)
    with writing_json(options.json) as write:
        if stream.is_given(options):
            return stream.run(options, load, write)
        return _inspect_images(options, write)


def _inspect_images(options: argparse.Namespace, write: WriteJson) -> int:
    paths = _images(options.images, options.out)
    detector = load(options.prompt_set, options.device)
    # Below the folder that all have in common no two have one name.
    common = os.path.commonpath([os.path.abspath(_folder(path)) for path in options.images])
    rows: list[dict[str, object]] = []
    try:
        for path in tqdm(paths, desc="inspecting", leave=False, disable=None):
            name = os.path.relpath(path, common)
            overlay = None if options.out is None else options.out / f"{name}.png"
            rows.append(_inspect(detector, path, overlay))
            sys.stdout.flush()
    finally:
        # Also when it is interrupted, or nobody reads any further.
        write(rows)
    failed = sum(row["error"] is not None for row in rows)
    if failed:
        print(f"error: {failed} of {len(rows)} images: see what is said of them", file=sys.stderr)
    return 1 if failed else 0


def load(path: Path, device: str) -> Detector | ExportedDetector:
    """What inspects: a prompt set with its backbone, or an exported graph."""
    from apt_ray.detection.detector import Detector
    from apt_ray.detection.prompt_set import PromptSet
    from apt_ray.export.exported import ExportedDetector, format_of
    from apt_ray.features.clip import load_backbone

    if format_of(path) is None:
        prompt_set = PromptSet.load(path)
        return Detector(load_backbone(prompt_set.backbone, device=device), prompt_set)
    if device != "cpu":
        raise SettingsError(f"an exported graph runs on the CPU, not on {device}: leave it out")
    return ExportedDetector.load(path)


def _inspect(
    detector: Detector | ExportedDetector, path: Path, overlay: Path | None
) -> dict[str, object]:
    """What is said of one image, printed too; what is wrong with the file is said of it."""
    from apt_ray.images import draw_overlay, read_image

    row: dict[str, object] = {
        "image": printable(path),
        "category": detector.category,
        **dict.fromkeys(
            ("anomaly_score", "threshold", "is_anomalous", "p_value", "kinds", "error")
        ),
    }
    try:
        image = read_image(path, detector.reading)
        (inspection,) = detector.inspect([image])
        verdict = "ANOMALOUS" if inspection.is_anomalous else "normal"
        p_value = "" if inspection.p_value is None else f"  p {inspection.p_value:.3f}"
        kinds = inspection.kinds
        kind = max(kinds, key=kinds.__getitem__, default=None)
        named = "" if kind is None else f"  {printable(kind)} {kinds[kind]:.2f}"
        tqdm.write(
            f"{verdict:9}  score {inspection.anomaly_score:.4f}"
            f"  threshold {inspection.threshold:.4f}{p_value}{named}  {printable(path)}"
        )
        row |= {
            "anomaly_score": inspection.anomaly_score,
            "threshold": inspection.threshold,
            "is_anomalous": inspection.is_anomalous,
            "p_value": inspection.p_value,
            "kinds": dict(inspection.kinds),
        }
        if overlay is not None:
            drawn = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
            with writing(overlay) as place:
                drawn.save(place, format="PNG")
            row["overlay"] = printable(overlay)
    except (DataError, ImageError, WriteError) as error:
        row["error"] = printable(error)
        tqdm.write(f"{'error':9}  {row['error']}")
    return row


def _images(paths: Sequence[Path], out: Path | None) -> list[Path]:
    """Files, and those below folders except in `out`: overlays of an earlier run are no images."""
    from apt_ray.data.folders import images_below

    found: list[Path] = []
    for path in paths:
        if out is not None and os.path.realpath(out) == os.path.realpath(_folder(path)):
            raise DataError(
                f"overlays in {out} would lie among images and be taken for some: give another"
                f" --out"
            )
        images = images_below(path) if path.is_dir() else [path]
        if out is not None and is_within(out, path):
            images = [image for image in images if not is_within(image.parent, out)]
        found += images
    if not found:
        raise DataError(f"no image in {', '.join(map(str, paths))}: give files or other folders")
    return list(dict.fromkeys(found))


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
