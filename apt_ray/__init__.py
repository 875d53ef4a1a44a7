"""Finds defects in pictures of products, from a handful of good pictures.

The names below are the whole interface that most programs need; each is loaded when it is first
used, so that `import apt_ray` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_ray.config import BackboneSpec as BackboneSpec
    from apt_ray.config import FitSettings as FitSettings
    from apt_ray.data.folders import find_categories as find_categories
    from apt_ray.detection.detector import Detector as Detector
    from apt_ray.detection.prompt_set import PromptSet as PromptSet
    from apt_ray.features.clip import load_backbone as load_backbone
    from apt_ray.images import draw_overlay as draw_overlay
    from apt_ray.images import read_image as read_image
    from apt_ray.prompts.fit import fit as fit

_HOME = {
    "BackboneSpec": "config",
    "Detector": "detection.detector",
    "FitSettings": "config",
    "PromptSet": "detection.prompt_set",
    "draw_overlay": "images",
    "find_categories": "data.folders",
    "fit": "prompts.fit",
    "load_backbone": "features.clip",
    "read_image": "images",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apt_ray' has no attribute {name!r}")
    return getattr(import_module(f"apt_ray.{_HOME[name]}"), name)
