"""The one place that knows which reference encoders there are."""

from __future__ import annotations

from pathlib import Path

import torch

from apt_ray.config import (
    BACKBONE,
    TIMM,
    TRUNK_INPUT_SIZE,
    TRUNK_POOL,
    TRUNK_STAGES,
    BackboneSpec,
)
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
            lengths=spec.reference_lengths,
            device=device,
            precision=precision,
        )
    return Trunk(
        stages=spec.reference_layers or TRUNK_STAGES,
        input_size=spec.reference_input_size or TRUNK_INPUT_SIZE,
        pool=spec.reference_pool or TRUNK_POOL,
        lengths=spec.reference_lengths,
        device=device,
        precision=precision,
    )
