"""The one place that knows which reference encoders there are."""

from __future__ import annotations

from pathlib import Path

import torch

from apt_ray.config import BACKBONE, TIMM, BackboneSpec
from apt_ray.features import trunk
from apt_ray.features.protocol import ReferenceEncoder
from apt_ray.features.timm_encoder import TimmEncoder
from apt_ray.features.trunk import Trunk


def load_reference_encoder(spec: BackboneSpec, *, device: str) -> ReferenceEncoder | None:
    """The reference encoder that `spec` names; None if that is the backbone itself."""
    if spec.reads == BACKBONE:
        return None
    precision = getattr(torch, spec.precision)
    if spec.reads.startswith(TIMM):
        return TimmEncoder(
            spec.reads.removeprefix(TIMM),
            weights=Path(spec.reference_pretrained) if spec.reference_pretrained else None,
            layers=spec.reference_layers,
            input_size=spec.reference_input_size,
            pool=spec.reference_pool,
            device=device,
            precision=precision,
        )
    return Trunk(
        stages=spec.reference_layers or trunk.STAGES,
        input_size=spec.reference_input_size or trunk.INPUT_SIZE,
        pool=spec.reference_pool or trunk.POOL,
        device=device,
        precision=precision,
    )
