"""Imports open_clip and timm where a CPU build of torch stands beside a CUDA build of torchvision.

PyPI's torchvision for Linux is built for CUDA. Beside a CPU torch its compiled operators cannot
load, and `import torchvision` then fails with "operator torchvision::nms does not exist",
although open_clip uses none of these operators. Declaring the two schemas that torchvision's
Python code refers to lets the import pass.
"""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def compiled_operators_load() -> bool:
    """Whether the operator library of the installed torchvision can be loaded into this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    libraries = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


@cache
def _declare_missing_operators() -> "torch.library.Library | None":
    """Declare torchvision's schemas once a process; the result keeps the declaration alive."""
    if compiled_operators_load():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def import_open_clip() -> ModuleType:
    """The module `open_clip`, whichever builds of torch and torchvision are installed."""
    _declare_missing_operators()
    import open_clip

    module: ModuleType = open_clip
    return module


def import_timm() -> ModuleType:
    """The module `timm`, likewise."""
    _declare_missing_operators()
    import timm

    module: ModuleType = timm
    return module
