"""Engines of replicas for tests: the real one, on the backbone that the session has loaded."""

from typing import Any

from serving.replica.inspector import Inspector
from serving.settings import Batching, HttpLimits
from tests.backbones import shared_backbone


def torch_inspector(**options: Any) -> Inspector:
    """An `Inspector` of these arguments that neither loads nor compiles anything: PyTorch encodes.

    `batching` may say all but the runtime; `limits` are those of a fleet if none are given.
    """
    batching = options.pop("batching", Batching()).model_copy(update={"runtime": "torch"})
    limits = options.pop("limits", HttpLimits().image)
    return Inspector(limits=limits, batching=batching, load=shared_backbone, **options)
