"""`apt-ray export`: a prompt set and its backbone as one graph for other runtimes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from apt_ray.cli.common import add_command
from apt_ray.cli.flags import count, number
from apt_ray.files import check_writable

if TYPE_CHECKING:
    from PIL import Image

    from apt_ray.detection.prompt_set import PromptSet

_FORMATS = ("onnx", "openvino", "torchscript")
_PRECISIONS = ("float32", "bfloat16", "int8")
_LONGEST = 8192


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = add_command(
        commands, "export", _run, "make one graph of a prompt set, for devices without PyTorch"
    )
    export.add_argument("prompt_set", type=Path, help="file that `fit` wrote")
    export.add_argument(
        "--format", choices=_FORMATS, default="onnx", help="of the file or files (onnx)"
    )
    export.add_argument(
        "--out", type=Path, required=True, help="folder for CATEGORY.onnx, .xml and .bin, or"
        " .torchscript"
    )  # fmt: skip
    export.add_argument(
        "--size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="frames of this size go in, such as a camera's, and the graph resizes them as"
        " apt-ray does; without it whoever feeds it resizes them",
    )
    export.add_argument(
        "--batch", type=count, metavar="N", help="always so many images at a time; else any number"
    )
    export.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="of the arithmetic: bfloat16 for openvino, int8 for onnx (float32)",
    )
    export.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        help="images, or folders of images, to check the graph on beside the support images",
    )
    export.add_argument(
        "--threshold",
        type=number(float, most=1),
        metavar="SCORE",
        help="the graph's threshold, in place of the prompt set's",
    )
    export.add_argument(
        "--region-of-interest",
        type=Path,
        metavar="MASK",
        help="image that is white where defects count, stretched over each image",
    )


def _run(options: argparse.Namespace) -> int:
    check_writable(options.out, is_folder=True)
    from apt_ray.detection.detector import Detector
    from apt_ray.detection.prompt_set import PromptSet
    from apt_ray.export.exporting import export_detector
    from apt_ray.features.clip import load_backbone
    from apt_ray.images import read_region

    prompt_set = PromptSet.load(options.prompt_set)
    if options.threshold is not None:
        threshold = prompt_set.threshold.moved_to(options.threshold)
        prompt_set = prompt_set.with_threshold(threshold)
    region = options.region_of_interest
    detector = Detector(
        load_backbone(prompt_set.backbone),
        prompt_set,
        region_of_interest=None if region is None else read_region(region),
    )
    exported = export_detector(
        detector,
        options.format,
        frame=options.size,
        batch=options.batch,
        precision=options.precision,
        images=_images(options.images, prompt_set),
    )
    path = exported.save(options.out)
    header = exported.header
    megabytes = sum(map(len, exported.files.values())) / 1e6
    print(
        f"{path}: {header.provenance.category}, {header.width} x {header.height} pixels,"
        f" {'any number of' if header.batch is None else header.batch} images at a time,"
        f" {header.precision}, {megabytes:.1f} MB"
    )
    print(
        f"threshold {header.provenance.threshold.value:.4f}; scores of {exported.checked} images"
        f" differ from the detector's by at most {exported.difference:.1g} ({header.tolerance:g} is"
        f" allowed)"
    )
    return 0


def _images(paths: list[Path], prompt_set: PromptSet) -> list[Image.Image]:
    from apt_ray.data.folders import images_below
    from apt_ray.errors import DataError
    from apt_ray.images import read_image

    files = [file for path in paths for file in (images_below(path) if path.is_dir() else [path])]
    if paths and not files:
        raise DataError(f"no image in {', '.join(map(str, paths))}: give files or other folders")
    return [read_image(file, prompt_set.reading) for file in files]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    sides = tuple(map(int, found.groups())) if found else (0, 0)
    if not (0 < sides[0] <= _LONGEST and 0 < sides[1] <= _LONGEST):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not WIDTHxHEIGHT, such as 1920x1080, of at most {_LONGEST} pixels a side"
        )
    return sides[0], sides[1]
