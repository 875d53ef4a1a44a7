"""The one place that knows which reference encoders there are."""

from __future__ import annotations

import torch

from apt_ray.config import BackboneSpec
from apt_ray.features import trunk
from apt_ray.features.protocol import ReferenceEncoder
from apt_ray.features.trunk import Trunk


def load_reference_encoder(spec: BackboneSpec, *, device: str) -> ReferenceEncoder | None:
    """The reference encoder that `spec` names; None if that is the backbone itself."""
    if spec.reference_encoder == "backbone":
        return None
    return Trunk(
        stages=spec.reference_layers or trunk.STAGES,
        input_size=spec.reference_input_size or trunk.INPUT_SIZE,
        pool=spec.reference_pool,
        device=device,
        precision=getattr(torch, spec.precision),
    )
