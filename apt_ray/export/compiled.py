"""Both encoders of a backbone compiled by OpenVINO, for a process that serves many categories.

A graph for each category would encode an image anew for each, and hold the weights as often. So a
replica compiles the backbone alone, and scores by the rule as it is in PyTorch.

B images, H, W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from apt_ray.detection.detector import probe_image
from apt_ray.errors import ExportError
from apt_ray.export.writers import quiet
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.protocol import ImageFeatures
from apt_ray.optional import require

_TOLERANCE = 1e-4  # of features, as a share of the largest of their layer


class _Encoders(nn.Module):
    """The features of an image as a tuple: patch tokens, the whole image, reference layers."""

    def __init__(self, backbone: FrozenCLIP) -> None:
        super().__init__()
        self._backbone = backbone

    def forward(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self._backbone.encode_images(pixels_B3HW)
        return (features.tokens_BNE, features.cls_BE, *features.layers.values())


def compile_encoders(backbone: FrozenCLIP, *, threads: int) -> None:
    """Let a backbone on the CPU encode images by OpenVINO from now on, on so many threads.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        ExportError: It cannot compile the encoders, or computes other features.
    """
    require("openvino", extra="edge")
    pixels_13HW = backbone.preprocess([probe_image((backbone.input_size,) * 2)])
    expected = backbone.encode_images(pixels_13HW)
    try:
        compiled = _compile(backbone, pixels_13HW, threads)
    except Exception as error:  # the tracer's, the converter's and the compiler's own
        raise ExportError(
            f"OpenVINO cannot compile {backbone.spec.name} ({str(error).strip()[:300]}): serve it"
            f" with `runtime: torch`"
        ) from error

    layers = list(expected.layers)

    def encode_one(pixels_3HW: torch.Tensor) -> list[torch.Tensor]:
        answered = compiled([np.ascontiguousarray(pixels_3HW[None].numpy())])
        # Copied: the next image is written over what OpenVINO gives.
        return [torch.from_numpy(answered[place].copy()) for place in range(2 + len(layers))]

    def encode(pixels_B3HW: torch.Tensor) -> ImageFeatures:
        images = [encode_one(pixels_3HW) for pixels_3HW in pixels_B3HW]
        tokens_BNE, cls_BE, *others = (torch.cat(parts) for parts in zip(*images, strict=True))
        return ImageFeatures(
            tokens_BNE=tokens_BNE, cls_BE=cls_BE, layers=dict(zip(layers, others, strict=True))
        )

    found = encode(pixels_13HW)
    for ours, theirs in (
        (expected.tokens_BNE, found.tokens_BNE),
        (expected.cls_BE, found.cls_BE),
        *((expected.layers[layer], found.layers[layer]) for layer in expected.layers),
    ):
        difference = float((ours - theirs).abs().max() / ours.abs().max())
        if not difference <= _TOLERANCE:
            raise ExportError(
                f"OpenVINO computes features of {backbone.spec.name} that differ by"
                f" {difference:.2g}: serve it with `runtime: torch`"
            )
    backbone.encode_by(encode)


def _compile(backbone: FrozenCLIP, pixels_13HW: torch.Tensor, threads: int):  # type: ignore[no-untyped-def]
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    encoders = _Encoders(backbone)
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(encoders, pixels_13HW, check_trace=False)
        # `openvino.convert_model` does the same, and reports to its makers.
        decoder = TorchScriptPythonDecoder(traced, example_input=(pixels_13HW,))
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    # What has traced a module holds it in a circle until garbage is collected: not the weights.
    del encoders._backbone
    # One image at a time: with its number fixed OpenVINO lays out memory beforehand, and several at
    # once are no faster on CPUs.
    model.reshape(openvino.PartialShape(list(pixels_13HW.shape)))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", settings)
