"""The three stages of a block: decode, model, conclude. Each row that passes between is a block.

All are actors. As tasks, the first and the last would start a process for nearly each block on a
small node, where Ray ends what idles for a second, and importing PyTorch takes longer than a block.

Ray Data cuts and merges its own blocks as their bytes suggest, but a row stays whole: a row that
holds the pixels of all images of a block meets its end as one file.

B images of a block, S pixels a side.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from apt_ray.detection.calibration import Threshold
from apt_ray.detection.detector import Detector, Inspection, conclude
from apt_ray.errors import DataError, ImageError, WriteError
from apt_ray.features.clip import load_backbone
from apt_ray.features.pixels import from_levels, to_levels
from apt_ray.features.protocol import Backbone
from apt_ray.images import ImageLimits, decode_image, draw_overlay, encode_png
from apt_ray.levels import Reading
from serving.bulk.inputs import Input, digest, from_table, readable
from serving.bulk.results import Output, Tally, regions_of, tally_rows, to_rows
from serving.bulk.versions import Version, detector_of
from serving.runtime import choose_runtime
from serving.settings import Runtime

Overlays = Literal["rejects", "all", "none"]

# Waiting for S3 leaves a processor free; more pixels than these of one task need not be in flight.
_READERS = 4
_LIMITS = ImageLimits(max_bytes=sys.maxsize)

# What kills its process, as an image may that no decoder survives, would do so for ever.
_ATTEMPTS = 4

_BLOCK = [("start", pa.int64()), ("stop", pa.int64()), ("size", pa.int32())]
TO_DO = pa.schema(_BLOCK)
"""A block that is to be inspected: its part of the table of inputs, and S."""
_DECODED = pa.schema(
    [
        *_BLOCK,
        ("images", pa.string()),
        ("levels", pa.large_binary()),
        ("decode_s", pa.float64()),
        ("given_up", pa.bool_()),
    ]
)
_SCORED = pa.schema(
    [
        *_BLOCK,
        ("images", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("maps", pa.large_binary()),
        ("map_side", pa.int32()),
        ("decode_s", pa.float64()),
        ("model_s", pa.float64()),
        ("given_up", pa.bool_()),
    ]
)
DONE = pa.schema(
    [
        *_BLOCK,
        ("tallies", pa.string()),
        ("decode_s", pa.float64()),
        ("model_s", pa.float64()),
        ("conclude_s", pa.float64()),
        ("given_up", pa.bool_()),
        ("failure", pa.string()),
    ]
)
"""What came of a block: sums, seconds of work, whether it was given up, for its processes died
again and again, and why it could not be written, if so."""


class Attempts:
    """An actor that counts how often each stage began with each block: Ray tries again for ever."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[str, int]] = Counter()

    def is_last(self, stage: str, start: int) -> bool:
        """Count one more; whether these were enough."""
        self._begun[stage, start] += 1
        return self._begun[stage, start] > _ATTEMPTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What the first and the last stage know of a version, without its tensors."""

    number: int | None
    reading: Reading
    threshold: Threshold

    @classmethod
    def of(cls, version: Version) -> "Verdicts":
        prompt_set = version.prompt_set
        return cls(
            number=version.number, reading=prompt_set.reading, threshold=prompt_set.threshold
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What all stages know.

    Attributes:
        inputs: the table of all inputs, in Ray's object store.
        verdicts: by category.
        output: where to.
        overlays: of which images.
        attempts: a handle of `Attempts`.
    """

    inputs: "ray.ObjectRef[Any]"
    verdicts: Mapping[str, Verdicts]
    output: Output
    overlays: Overlays
    attempts: Any

    def is_given_up(self, stage: str, start: int) -> bool:
        """Whether a stage has begun with a block too often; it begins once more now."""
        return bool(ray.get(self.attempts.is_last.remote(stage, start)))

    def part(self, start: int, stop: int) -> list[Input]:
        """Inputs of a block."""
        table: pa.Table = ray.get(self.inputs)
        return from_table(table.slice(start, stop - start))


class Decoder:
    """The first stage: images of a block, as large as the backbone takes them.

    Args:
        batch: what all stages know.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        start, stop, size = _place(block)
        is_given_up = self._batch.is_given_up("decode", start)
        inputs = [] if is_given_up else self._batch.part(start, stop)
        with ThreadPoolExecutor(_READERS) as readers:
            found = list(readers.map(lambda each: _decode(each, self._batch, size), inputs))
        levels = [pixels for _, pixels in found if pixels is not None]
        return pa.table(
            [
                *_columns(start, stop, size),
                [json.dumps([said for said, _ in found])],
                _binary(np.stack(levels) if levels else b""),
                [time.perf_counter() - started],
                [is_given_up],
            ],
            schema=_DECODED,
        )


class Model:
    """The second stage: scores of a block, and maps of the images that need one.

    Args:
        batch: what all stages know.
        versions: of all categories, in Ray's object store.
        batch_size: images of one forward pass.
        threads: that compute.
        device: of torch.
        runtime: that encodes images.
    """

    def __init__(
        self,
        *,
        batch: Batch,
        versions: "ray.ObjectRef[Any]",
        batch_size: int,
        threads: int,
        device: str,
        runtime: Runtime,
    ) -> None:
        self._batch = batch
        self._batch_size, self._threads = batch_size, threads
        torch.set_num_threads(threads)
        backbones: dict[str, Backbone] = {}
        self._detectors: dict[str, Detector] = {}
        for category, version in ray.get(versions).items():
            prompt_set = version.prompt_set
            if prompt_set.fingerprint not in backbones:
                backbone = load_backbone(prompt_set.backbone, device=device)
                choose_runtime(backbone, runtime, threads=threads)
                backbones[prompt_set.fingerprint] = backbone
            self._detectors[category] = detector_of(version, backbones[prompt_set.fingerprint])

    @torch.inference_mode()
    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        torch.set_num_threads(self._threads)  # of the thread in which Ray calls
        start, stop, size = _place(block)
        is_given_up = block["given_up"][0].as_py() or self._batch.is_given_up("model", start)
        images = [] if is_given_up else json.loads(block["images"][0].as_py())
        categories = [each["category"] for each in images if each["error"] is None]
        levels = np.frombuffer(block["levels"][0].as_buffer(), np.uint8)
        levels_BSS3 = levels.reshape(-1, size, size, 3)
        scores: list[float] = []
        maps: list[NDArray[np.float32]] = []
        for first in range(0, len(categories), self._batch_size):
            some = slice(first, first + self._batch_size)
            for score, map_SS in self._score(categories[some], levels_BSS3[some]):
                scores.append(score)
                if map_SS is not None:
                    maps.append(map_SS)
        return pa.table(
            [
                *_columns(start, stop, size),
                block["images"],
                pa.array([scores], pa.list_(pa.float64())),
                _binary(np.stack(maps) if maps else b""),
                pa.array([maps[0].shape[-1] if maps else 0], pa.int32()),
                block["decode_s"],
                [time.perf_counter() - started],
                [is_given_up],
            ],
            schema=_SCORED,
        )

    def _score(
        self, categories: list[str], levels_BSS3: NDArray[np.uint8]
    ) -> list[tuple[float, NDArray[np.float32] | None]]:
        """One forward pass for all categories, then a score for each, and maps of the rejected."""
        backbone = self._detectors[categories[0]].backbone
        # A copy, for torch warns of what cannot be written to.
        levels = torch.from_numpy(levels_BSS3.copy()).to(backbone.device)
        features = backbone.encode_images(from_levels(levels))
        rows: dict[str, list[int]] = defaultdict(list)
        for row, category in enumerate(categories):
            rows[category].append(row)
        found: dict[int, tuple[float, NDArray[np.float32] | None]] = {}
        for category, some in rows.items():
            detector = self._detectors[category]
            maps_BSS, scores_B = detector.score(
                features if len(some) == len(categories) else features[some]
            )
            rejects = detector.prompt_set.threshold.rejects
            for row, map_SS, score in zip(some, maps_BSS, scores_B.tolist(), strict=True):
                is_drawn = self._batch.overlays == "all" or rejects(score)
                found[row] = (score, map_SS.cpu().numpy() if is_drawn else None)
        return [found[row] for row in range(len(categories))]


class Writer:
    """The last stage: regions, overlays and the file of a block.

    Args:
        batch: what all stages know.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        start, stop, size = _place(block)
        is_given_up = block["given_up"][0].as_py() or self._batch.is_given_up("conclude", start)
        tallies, failure = {}, None
        if not is_given_up:
            try:
                inputs = self._batch.part(start, stop)
                rows = to_rows(_rows(block, inputs, self._batch))
                self._batch.output.write(digest(inputs, str(size)), rows)
                tallies = tally_rows(rows)
            except WriteError as error:
                failure = str(error)
        return pa.table(
            [
                *_columns(start, stop, size),
                [json.dumps({category: asdict(tally) for category, tally in tallies.items()})],
                block["decode_s"],
                block["model_s"],
                [time.perf_counter() - started],
                [is_given_up],
                pa.array([failure], pa.string()),
            ],
            schema=DONE,
        )


def read_tallies(text: str) -> dict[str, Tally]:
    """The sums of a row of `DONE`."""
    return {category: Tally(**values) for category, values in json.loads(text).items()}


def _decode(
    each: Input, batch: Batch, size: int
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    said: dict[str, Any] = {"category": each.category, "error": None, "width": None, "height": None}
    try:
        image = decode_image(
            each.read(),
            limits=_LIMITS,
            source=readable(each.source),
            reading=batch.verdicts[each.category].reading,
        )
    except (DataError, ImageError) as error:
        return said | {"error": str(error)}, None
    return said | {"width": image.width, "height": image.height}, to_levels(image, (size, size))


def _rows(block: pa.Table, inputs: list[Input], batch: Batch) -> list[dict[str, Any]]:
    images = json.loads(block["images"][0].as_py())
    scores = iter(block["scores"][0].as_py())
    side = block["map_side"][0].as_py()
    values = np.frombuffer(block["maps"][0].as_buffer(), np.float32)
    maps = iter(values.reshape(-1, side, side) if side else ())
    rows = []
    for each, said in zip(inputs, images, strict=True):
        verdicts = batch.verdicts[each.category]
        row: dict[str, Any] = {
            "path": readable(each.path),
            "member": each.member or None,
            "category": each.category,
            "version": verdicts.number,
            "threshold": verdicts.threshold.value,
            "error": said["error"],
            "width": said["width"],
            "height": said["height"],
        }
        if said["error"] is None:
            score = next(scores)
            is_anomalous = verdicts.threshold.rejects(score)
            row |= {
                "anomaly_score": score,
                "is_anomalous": is_anomalous,
                "p_value": verdicts.threshold.p_value(score),
                "regions": [],
            }
            if is_anomalous or batch.overlays == "all":
                size = said["width"], said["height"]
                map_SS = torch.from_numpy(next(maps).copy())
                inspection = conclude(verdicts.threshold, map_SS, score, size)
                row["regions"] = regions_of(inspection.regions)
                if batch.overlays != "none":
                    row["overlay"] = _draw(each, inspection, verdicts, batch.output)
        rows.append(row)
    return rows


def _draw(each: Input, inspection: Inspection, verdicts: Verdicts, output: Output) -> str | None:
    """Draw an overlay of the image, which is read again: few are. Returns where it lies, or None
    where the image has gone meanwhile."""
    try:
        image = decode_image(
            each.read(), limits=_LIMITS, source=readable(each.source), reading=verdicts.reading
        )
        drawn = draw_overlay(image, inspection.anomaly_map, threshold=inspection.threshold)
    except (DataError, ImageError, ValueError):
        return None
    return output.write_overlay(each.category, digest([each], ""), encode_png(drawn))


def _place(block: pa.Table) -> tuple[int, int, int]:
    start, stop, size = (block[name][0].as_py() for name, _ in _BLOCK)
    return start, stop, size


def _binary(values: NDArray[Any] | bytes) -> pa.Array:
    """A column of one row that holds these bytes, without a copy.

    `pa.array` of a buffer never lets go of it (pyarrow 25).
    """
    data = pa.py_buffer(values)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _columns(start: int, stop: int, size: int) -> list[pa.Array]:
    return [
        pa.array([each], kind) for each, (_, kind) in zip((start, stop, size), _BLOCK, strict=True)
    ]
