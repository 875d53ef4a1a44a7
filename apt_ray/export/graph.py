"""A detector as one graph: uint8 pixels in; anomaly maps, scores and verdicts out.

The graph is traced from the detector itself, so nothing of it can be left behind: both encoders,
text features, memory, scales, region of interest and threshold are constants in it.

N images, H, W pixels, S pixels a side of a map.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from apt_ray.detection.detector import Detector
from apt_ray.features.pixels import to_pixels_in_graph


class DetectorGraph(nn.Module):
    """What is exported.

    Args:
        detector: on the CPU.
        resizes: whether images of another size than the encoders' go in.
    """

    def __init__(self, detector: Detector, *, resizes: bool) -> None:
        super().__init__()
        self._detector = detector
        self._resizes = resizes
        self._threshold = _rounded_down(detector.prompt_set.threshold.value)

    def forward(self, pixels_NHW3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 RGB -> maps `(N, S, S)` and scores `(N,)`, float32 in 0..1, verdicts `(N,)`
        bool."""
        levels_N3HW = pixels_NHW3.permute(0, 3, 1, 2).float()
        backbone = self._detector.backbone
        pixels_N3HW = (
            to_pixels_in_graph(levels_N3HW, backbone.input_size)
            if self._resizes
            else levels_N3HW / 255
        )
        maps_NSS, scores_N = self._detector.score(backbone.encode_images(pixels_N3HW))
        return maps_NSS, scores_N, scores_N > self._threshold


def _rounded_down(value: float) -> float:
    """The float32 above which exactly those float32 are that are above `value`."""
    nearest = np.float32(value)
    if float(nearest) > value:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    return float(nearest)
