"""From a detector to a graph in files, once its scores prove to be the detector's.

N images, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from apt_ray.detection.detector import Detector, probe_image
from apt_ray.errors import ExportError, SettingsError
from apt_ray.export.exported import ExportedDetector, pixels_of
from apt_ray.export.graph import DetectorGraph
from apt_ray.export.header import ExportHeader, Format, GraphPrecision
from apt_ray.export.writers import (
    MODULES,
    SUFFIXES,
    Files,
    quantise,
    to_onnx,
    write_onnx,
    write_openvino,
    write_torchscript,
)
from apt_ray.files import StrPath, write_whole
from apt_ray.images import decode_image
from apt_ray.optional import require
from apt_ray.version import __version__

TOLERANCES: dict[GraphPrecision, float] = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.02}
"""What a score may differ from the detector's, by the precision of the graph."""

PRECISIONS: dict[Format, tuple[GraphPrecision, ...]] = {
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16"),
    "torchscript": ("float32",),
}
"""Those that a format has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A graph that scores as its detector does.

    Attributes:
        files: the content of each of its files, by suffix.
        header: what it says of itself.
        checked: images that it was checked on, the test image among them.
        difference: of any score of these from the detector's, at most.
        map_difference: of any place of a map, at most.
    """

    files: Files
    header: ExportHeader
    checked: int
    difference: float
    map_difference: float

    def save(self, folder: StrPath) -> Path:
        """Write the files, named by the category; returns the one to open.

        Raises:
            WriteError: A file cannot be written.
        """
        stem = Path(folder) / self.header.provenance.category
        # The one that is opened comes last.
        paths = [Path(f"{stem}{suffix}") for suffix in self.files]
        for path, data in reversed([*zip(paths, self.files.values(), strict=True)]):
            write_whole(path, data)
        return paths[0]


def export_detector(
    detector: Detector,
    format: Format = "onnx",  # noqa: A002
    *,
    frame: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: GraphPrecision = "float32",
    images: Sequence[Image.Image] = (),
) -> Export:
    """Make a graph of a detector, and hold its scores against the detector's.

    Args:
        detector: on the CPU, with the threshold and the region of interest that the graph is to
            have.
        format: onnx, openvino or torchscript.
        frame: (width, height) of the images that will go in, which the graph then resizes; None
            takes them resized.
        batch: how many images go in together; None is any number.
        precision: of the graph's arithmetic: bfloat16 for OpenVINO, int8 for ONNX.
        images: of the product, on which it is checked beside the test image and the support images
            that the prompt set holds.

    Raises:
        MissingDependencyError: The format needs a library that is not installed.
        SettingsError: The format has no such precision, or the detector is not on the CPU or not in
            float32.
        ExportError: The model cannot be exported, or a score differs by more than `TOLERANCES`.
    """
    if MODULES[format]:
        require(*MODULES[format], extra="edge")
    _check_settings(detector, format, precision)
    own_size = (detector.backbone.input_size,) * 2
    size = frame or own_size
    shown = [
        image.resize(size, Image.Resampling.BICUBIC)
        for image in (probe_image(own_size), *_support(detector), *images)
    ]
    shown[0] = probe_image(size)
    features = detector.backbone.encode_images(detector.backbone.preprocess(shown))
    maps_NSS, scores_N = (part.numpy() for part in detector.score(features))
    prompt_set = detector.prompt_set
    header = ExportHeader(
        library_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        width=size[0],
        height=size[1],
        preprocessing=ExportHeader.preprocessing_of(takes_frames=frame is not None),
        batch=batch,
        precision=precision,
        tolerance=TOLERANCES[precision],
        counted_share=detector.counted_share,
        probe_score=float(scores_N[0]),
        provenance=prompt_set.provenance,
    )
    pixels_NHW3 = pixels_of(shown, size)
    files = _write(DetectorGraph(detector, resizes=size != own_size), format, header, pixels_NHW3)
    exported = ExportedDetector(format, files, source=f"the graph of {prompt_set.category}")
    return _check(exported, files, maps_NSS, scores_N, pixels_NHW3)


def _check_settings(detector: Detector, kind: Format, precision: GraphPrecision) -> None:
    if precision not in PRECISIONS[kind]:
        raise SettingsError(
            f"{kind} has no {precision}: choose {' or '.join(PRECISIONS[kind])}, or another format"
        )
    backbone = detector.backbone
    if backbone.device.type != "cpu" or backbone.spec.precision != "float32":
        raise SettingsError(
            f"a graph is made of a detector on the CPU in float32, not on {backbone.device} in"
            f" {backbone.spec.precision}: load the backbone on the CPU; a prompt set that was"
            f" fitted in another precision has to be fitted again"
        )


def _write(
    graph: DetectorGraph,
    kind: Format,
    header: ExportHeader,
    pixels_NHW3: npt.NDArray[np.uint8],
) -> Files:
    count = header.batch or 2  # of one image a tracer believes that there is always one
    example = torch.from_numpy(np.resize(pixels_NHW3, (count, *pixels_NHW3.shape[1:])))
    category = header.provenance.category
    try:
        if kind == "torchscript":
            return write_torchscript(graph, example, header)
        model = to_onnx(graph, example, batch=header.batch)
        if header.precision == "int8":
            model = quantise(model)
        if kind == "onnx":
            return write_onnx(model, header)
        return write_openvino(model, header)
    except Exception as error:  # exporters and converters raise anything
        raise ExportError(
            f"{category} cannot be exported as {kind}: {str(error).strip()[:600]}; try another"
            f" format ({', '.join(SUFFIXES)}), or another encoder"
        ) from error


def _check(
    exported: ExportedDetector,
    files: Files,
    maps_NSS: npt.NDArray[np.float32],
    scores_N: npt.NDArray[np.float32],
    pixels_NHW3: npt.NDArray[np.uint8],
) -> Export:
    """Each image alone and all together, since a graph may take its batch for granted."""
    header = exported.header
    alone = [exported.run(pixels_NHW3[place : place + 1]) for place in range(len(pixels_NHW3))]
    together = exported.run(pixels_NHW3)
    difference = map_difference = 0.0
    for maps, scores, verdicts in (
        together,
        tuple(np.concatenate(part) for part in zip(*alone, strict=True)),
    ):
        difference = max(difference, float(np.abs(scores - scores_N).max()))
        map_difference = max(map_difference, float(np.abs(maps - maps_NSS).max()))
        rejected = [exported.threshold.rejects(score) for score in scores.tolist()]
        if verdicts.tolist() != rejected:
            raise ExportError(
                f"the graph of {exported.category} does not hold its scores against the threshold"
                f" as the detector does: try another format"
            )
    if not difference <= header.tolerance:
        remedy = (
            "try another format"
            if header.precision == "float32"
            else "export it in float32, or in another precision"
        )
        raise ExportError(
            f"the graph of {exported.category} in {header.precision} scores an image"
            f" {difference:.2g} otherwise than the detector, more than the {header.tolerance:g}"
            f" that is allowed: {remedy}"
        )
    return Export(
        files=files,
        header=header,
        checked=len(pixels_NHW3),
        difference=difference,
        map_difference=map_difference,
    )


def _support(detector: Detector) -> list[Image.Image]:
    """The support images that the prompt set holds."""
    return [decode_image(data) for data in detector.prompt_set.thumbnails]
