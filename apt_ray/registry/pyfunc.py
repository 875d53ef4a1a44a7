"""A registered version as an MLflow pyfunc: `mlflow.pyfunc.load_model("models:/apt-x@champion")`.

MLflow finds `_load_pyfunc` by the name in the version's MLmodel file. Nothing is unpickled, and
nothing here needs Ray.
"""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.images import decode_image
from apt_ray.registry.contents import PROMPT_SET

_BATCH = 8


class PromptSetModel:
    """What MLflow calls."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """What the detector says of each image file.

        Args:
            data: a table whose first column holds image files, or a list of them: bytes, or text
                that is their base64, which is how JSON carries bytes.
            params: unused; MLflow's interface.

        Returns:
            One row an image: `anomaly_score`, `threshold`, `is_anomalous`, and `p_value`, None
            without calibration images.

        Raises:
            ImageError: an entry is no image; the message counts from 0.
        """
        files: Iterable[bytes | str] = data.iloc[:, 0] if hasattr(data, "iloc") else data
        images = [
            decode_image(
                _file(file), source=f"image {place}", reading=self._detector.prompt_set.reading
            )
            for place, file in enumerate(files)
        ]
        return [
            {
                "anomaly_score": inspection.anomaly_score,
                "threshold": inspection.threshold,
                "is_anomalous": inspection.is_anomalous,
                "p_value": inspection.p_value,
            }
            for start in range(0, len(images), _BATCH)
            for inspection in self._detector.inspect(images[start : start + _BATCH])
        ]


def _load_pyfunc(path: str) -> PromptSetModel:
    prompt_set = PromptSet.load(Path(path) / PROMPT_SET)
    return PromptSetModel(Detector(load_backbone(prompt_set.backbone), prompt_set))


def _file(data: bytes | str) -> bytes:
    """The bytes of an image file; no accepted file type consists of base64's letters alone."""
    encoded = data.encode() if isinstance(data, str) else data
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return encoded
