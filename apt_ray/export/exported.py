"""ExportedDetector: an exported graph that inspects images as a `Detector` does.

N images, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from apt_ray.detection.calibration import Threshold
from apt_ray.detection.detector import Inspection, conclude, probe_image
from apt_ray.errors import ExportError, ImageError
from apt_ray.export.header import ExportHeader, Format
from apt_ray.export.runtimes import Answer, open_runtime
from apt_ray.export.writers import SUFFIXES
from apt_ray.features.pixels import to_levels
from apt_ray.files import StrPath
from apt_ray.levels import Reading

_DRIFT = 1e-3
"""What the score of a graph's own image may differ on another machine, which rounds in another way,
where the graph's tolerance is no more."""


class ExportedDetector:
    """A graph that `apt-ray export` wrote, ready to inspect images on this machine's CPU.

    Attributes:
        header: what the graph says of itself.
    """

    def __init__(
        self,
        kind: Format,
        files: Mapping[str, bytes],
        *,
        threads: int | None = None,
        source: str = "the graph",
    ) -> None:
        """Of a graph in memory; see `load`."""
        runtime = open_runtime(kind, files, threads=threads, source=source)
        self.header = ExportHeader.read(runtime.header, source)
        self._runtime = runtime

    @classmethod
    def load(cls, path: StrPath, *, threads: int | None = None) -> ExportedDetector:
        """The graph in a file: .onnx, .xml (with its .bin beside it) or .torchscript.

        It is tried on a test image, whose score it knows.

        Args:
            threads: that it computes on; None leaves it to the runtime. TorchScript computes on
                those of PyTorch.

        Raises:
            MissingDependencyError: Its runtime is not installed.
            ExportError: A file is missing, damaged, of another format, no export of apt-ray, or
                does not score its test image as it should.
        """
        path = Path(path)
        found = format_of(path)
        if found is None:
            raise ExportError(f"{path} is no exported graph: its name ends in none of {_known()}")
        files: dict[str, bytes] = {}
        for suffix in SUFFIXES[found]:
            file = path.with_suffix(suffix)
            try:
                files[suffix] = file.read_bytes()
            except OSError as error:
                raise ExportError(
                    f"cannot read {file} ({error.strerror}): check the path, or create it with"
                    f" `apt-ray export`"
                ) from error
        graph = cls(found, files, threads=threads, source=str(path))
        graph._test_itself(str(path))
        return graph

    @property
    def category(self) -> str:
        return self.header.provenance.category

    @property
    def reading(self) -> Reading:
        """How image files are to be read for it."""
        return self.header.provenance.reading

    @property
    def threshold(self) -> Threshold:
        return self.header.provenance.threshold

    def inspect(self, images: Sequence[Image.Image]) -> list[Inspection]:
        """Inspect RGB images: of any size, or of the graph's own where it takes frames.

        Raises:
            ImageError: The graph takes frames of another size.
        """
        maps_NSS, scores_N, _ = self.run(self.pixels(images))
        return [
            conclude(self.threshold, map_SS, score, image.size)
            for image, map_SS, score in zip(
                images, torch.from_numpy(maps_NSS), scores_N.tolist(), strict=True
            )
        ]

    def pixels(self, images: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
        """What goes into the graph for these images, `(N, H, W, 3)`; raises as `inspect`."""
        header = self.header
        size = (header.width, header.height)
        if header.takes_frames:
            for image in images:
                if image.size != size:
                    raise ImageError(
                        f"an image of {image.width} x {image.height} pixels cannot be inspected by"
                        f" a graph of frames of {size[0]} x {size[1]}: send such frames, or export"
                        f" with --size {image.width}x{image.height}, or without it"
                    )
        return pixels_of(images, size)

    def run(self, pixels_NHW3: npt.NDArray[np.uint8]) -> Answer:
        """Maps, scores and verdicts of any number of images; a fixed batch is filled up."""
        count, batch = len(pixels_NHW3), self.header.batch
        if batch is None:
            return self._runtime.run(pixels_NHW3)
        filled = np.concatenate([pixels_NHW3, np.repeat(pixels_NHW3[-1:], -count % batch, axis=0)])
        answers = [
            self._runtime.run(filled[start : start + batch])
            for start in range(0, len(filled), batch)
        ]
        maps_NSS, scores_N, verdicts_N = (
            np.concatenate(part)[:count] for part in zip(*answers, strict=True)
        )
        return maps_NSS, scores_N, verdicts_N

    def _test_itself(self, source: str) -> None:
        score = self.probe_score()
        if not abs(score - self.header.probe_score) <= max(self.header.tolerance, _DRIFT):
            raise ExportError(
                f"{source} scores its test image {score:.4f}, not {self.header.probe_score:.4f} as"
                f" when it was exported: the file is damaged, or this machine computes in another"
                f" precision; copy it again, or export it again with `apt-ray export`"
            )

    def probe_score(self) -> float:
        """The anomaly score of the test image."""
        size = (self.header.width, self.header.height)
        score = float(self.run(pixels_of([probe_image(size)], size))[1][0])
        return score if math.isfinite(score) else math.inf


def pixels_of(images: Sequence[Image.Image], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Images resized to `size` = (width, height), `(N, H, W, 3)`."""
    return np.stack([to_levels(image, size) for image in images])


def format_of(path: StrPath) -> Format | None:
    """The format of an exported graph, by its name; None for any other file."""
    suffix = Path(path).suffix.lower()
    return next((name for name, own in SUFFIXES.items() if suffix == own[0]), None)


def _known() -> str:
    return ", ".join(suffixes[0] for suffixes in SUFFIXES.values())
