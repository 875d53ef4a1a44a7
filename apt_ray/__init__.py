"""Finds defects in images of products, from a handful of normal images.

The names below are the whole interface that most programs need; each is loaded when it is first
used, so that `import apt_ray` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apt_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from apt_ray.config import BackboneSpec as BackboneSpec
    from apt_ray.config import FitSettings as FitSettings
    from apt_ray.data.folders import Category as Category
    from apt_ray.data.folders import LabelledImage as LabelledImage
    from apt_ray.data.folders import find_categories as find_categories
    from apt_ray.detection.calibration import Threshold as Threshold
    from apt_ray.detection.detector import Detector as Detector
    from apt_ray.detection.detector import Inspection as Inspection
    from apt_ray.detection.detector import Region as Region
    from apt_ray.detection.prompt_set import PromptSet as PromptSet
    from apt_ray.errors import AptError as AptError
    from apt_ray.errors import BackboneError as BackboneError
    from apt_ray.errors import DataError as DataError
    from apt_ray.errors import ExportError as ExportError
    from apt_ray.errors import FeedbackError as FeedbackError
    from apt_ray.errors import FeedbackQuotaError as FeedbackQuotaError
    from apt_ray.errors import FleetError as FleetError
    from apt_ray.errors import GateError as GateError
    from apt_ray.errors import ImageError as ImageError
    from apt_ray.errors import ImageTooLargeError as ImageTooLargeError
    from apt_ray.errors import MissingDependencyError as MissingDependencyError
    from apt_ray.errors import PromptSetError as PromptSetError
    from apt_ray.errors import RegistryConflictError as RegistryConflictError
    from apt_ray.errors import RegistryError as RegistryError
    from apt_ray.errors import RegistryUnavailableError as RegistryUnavailableError
    from apt_ray.errors import SettingsError as SettingsError
    from apt_ray.errors import UnsupportedImageError as UnsupportedImageError
    from apt_ray.errors import WriteError as WriteError
    from apt_ray.export.exported import ExportedDetector as ExportedDetector
    from apt_ray.export.exporting import Export as Export
    from apt_ray.export.exporting import export_detector as export_detector
    from apt_ray.features.clip import load_backbone as load_backbone
    from apt_ray.features.protocol import Backbone as Backbone
    from apt_ray.files import location as location
    from apt_ray.images import ImageLimits as ImageLimits
    from apt_ray.images import decode_image as decode_image
    from apt_ray.images import draw_overlay as draw_overlay
    from apt_ray.images import find_reading as find_reading
    from apt_ray.images import read_image as read_image
    from apt_ray.levels import Reading as Reading
    from apt_ray.prompts.fit import fit as fit
    from apt_ray.validation.evaluation import Result as Result
    from apt_ray.validation.evaluation import evaluate as evaluate
    from apt_ray.video.events import Event as Event
    from apt_ray.video.events import EventLevels as EventLevels
    from apt_ray.video.frames import Frame as Frame
    from apt_ray.video.frames import read_frames as read_frames
    from apt_ray.video.settings import WatchSettings as WatchSettings
    from apt_ray.video.watch import Watch as Watch
    from apt_ray.video.watch import Watched as Watched
    from apt_ray.video.watch import WatchSummary as WatchSummary
    from apt_ray.video.watch import watch_frames as watch_frames

_HOME = {
    # Learn and inspect, in the order in which they are used.
    "load_backbone": "features.clip",
    "BackboneSpec": "config",
    "Backbone": "features.protocol",
    "location": "files",
    "find_categories": "data.folders",
    "Category": "data.folders",
    "LabelledImage": "data.folders",
    "fit": "prompts.fit",
    "FitSettings": "config",
    "PromptSet": "detection.prompt_set",
    "Threshold": "detection.calibration",
    "Detector": "detection.detector",
    "Inspection": "detection.detector",
    "Region": "detection.detector",
    "export_detector": "export.exporting",
    "Export": "export.exporting",
    "ExportedDetector": "export.exported",
    "read_image": "images",
    "decode_image": "images",
    "ImageLimits": "images",
    "Reading": "levels",
    "find_reading": "images",
    "draw_overlay": "images",
    "evaluate": "validation.evaluation",
    "Result": "validation.evaluation",
    "read_frames": "video.frames",
    "Frame": "video.frames",
    "Watch": "video.watch",
    "WatchSettings": "video.settings",
    "watch_frames": "video.watch",
    "Watched": "video.watch",
    "Event": "video.events",
    "EventLevels": "video.events",
    "WatchSummary": "video.watch",
    # What they raise.
    "AptError": "errors",
    "SettingsError": "errors",
    "DataError": "errors",
    "ImageError": "errors",
    "ImageTooLargeError": "errors",
    "UnsupportedImageError": "errors",
    "BackboneError": "errors",
    "PromptSetError": "errors",
    "ExportError": "errors",
    "RegistryError": "errors",
    "RegistryUnavailableError": "errors",
    "RegistryConflictError": "errors",
    "FeedbackError": "errors",
    "FeedbackQuotaError": "errors",
    "FleetError": "errors",
    "GateError": "errors",
    "WriteError": "errors",
    "MissingDependencyError": "errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apt_ray' has no attribute {name!r}")
    return getattr(import_module(f"apt_ray.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
