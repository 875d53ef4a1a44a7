"""What an exported graph says of itself, inside its own file."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, ValidationError

from apt_ray.config import Settings
from apt_ray.detection.prompt_set import Provenance
from apt_ray.errors import ExportError

FORMAT_VERSION = 1
KEY = "apt-ray"
"""Under which the header, as JSON, stands in a file's metadata."""

Format = Literal["onnx", "openvino", "torchscript"]
GraphPrecision = Literal["float32", "bfloat16", "int8"]

INPUT = "pixels"
OUTPUTS = ("anomaly_map", "anomaly_score", "is_anomalous")

_PIXELS = "uint8 (images, height, width, 3), RGB, 0..255; mean and deviation are applied inside"
_ANY_SIZE = (
    "resize the whole image to width x height, bicubic and antialiased, as Pillow's Image.resize"
)
_FRAMES = "none: frames are resized inside"


class ExportHeader(Settings):
    """The header: where the graph comes from, how it is fed, what it must answer."""

    format_version: int = FORMAT_VERSION
    library_version: str = Field(description="Of the apt-ray that exported it.")
    created: str = Field(description="Time of the export, ISO 8601 in UTC.")
    width: int = Field(ge=1, description="Of the pixels that go in.")
    height: int = Field(ge=1, description="Of the pixels that go in.")
    pixels: str = _PIXELS
    preprocessing: str = Field(description="What is to be done to an image before it goes in.")
    batch: int | None = Field(ge=1, description="Images that go in together; None: any number.")
    precision: GraphPrecision
    tolerance: float = Field(gt=0, description="What scores may differ from the detector's.")
    counted_share: float = Field(
        default=1.0, ge=0, le=1, description="What a region of interest leaves of an image."
    )
    probe_score: float = Field(
        description="The detector's score of `apt_ray.detection.detector.probe_image` at this size."
    )
    provenance: Provenance = Field(description="Of the prompt set, with threshold and scales.")

    @property
    def takes_frames(self) -> bool:
        """Whether images of one size go in, and are resized in the graph."""
        return self.preprocessing == _FRAMES

    @staticmethod
    def preprocessing_of(*, takes_frames: bool) -> str:
        return _FRAMES if takes_frames else _ANY_SIZE

    @classmethod
    def read(cls, text: str | None, source: str) -> ExportHeader:
        """The header in a file's metadata; ExportError says what is wrong with `source`."""
        remedy = "export it again with `apt-ray export`"
        if text is None:
            raise ExportError(f"{source} was not exported by apt-ray: {remedy}")
        try:
            found = json.loads(text)["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"the header of {source} is damaged: {remedy}") from error
        if found != FORMAT_VERSION:
            raise ExportError(
                f"{source} has format {found}, this version of apt-ray reads {FORMAT_VERSION}:"
                f" {remedy} of this version, or install the one that wrote it"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ExportError(
                f"the header of {source} was not written by this version of apt-ray"
                f" ({error.error_count()} fields differ, first {error.errors()[0]['loc']}):"
                f" {remedy}"
            ) from error
