"""Backbones that the tests of one process share: they never change, and loading takes its time."""

from functools import cache

from apt_ray.config import BackboneSpec
from apt_ray.features.clip import FrozenCLIP, load_backbone


@cache
def shared_backbone(spec: BackboneSpec, *, device: str = "cpu") -> FrozenCLIP:
    """The backbone that `spec` names, loaded once; whoever changes it loads one of their own."""
    return load_backbone(spec, device=device)
