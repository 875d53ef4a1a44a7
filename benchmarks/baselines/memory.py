"""Nearest support patch: without rotations, and with them as in AnomalyDINO (Damm et al., 2024).

AnomalyDINO reads DINOv2 and masks the background of some products by hand-made rules; here the
patches are those of the reference layers that all methods share, and nothing is masked.
"""

from apt_ray.detection.reference import ReferenceMemory
from apt_ray.features.protocol import ImageFeatures
from benchmarks.baselines.support import ImageRule, Support


def fit_memory(support: Support) -> dict[str, ImageRule]:
    """The patches of the support images as they are."""
    return {"memory": _nearest(support, support.features)}


def fit_anomalydino(support: Support) -> dict[str, ImageRule]:
    """The patches of the support images in eight rotations."""
    return {"anomalydino": _nearest(support, support.turned)}


def _nearest(support: Support, features: ImageFeatures) -> ImageRule:
    memory = ReferenceMemory.of(features)
    # Half a cosine distance lies in 0..1, up to rounding, and keeps the order.
    return support.by_patches(lambda encoded: memory.distance(encoded.features).clamp_min(0) / 2)
