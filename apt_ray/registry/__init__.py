"""The registry of prompt sets: the versions of each category, and which of them serves.

Two aliases say what a version is for: `candidate` is the newest one, `champion` is the one that
serves. `protocol` says what a registry does, `contents` what a version holds, `history` how a
champion changes. `mlflow` is the registry that there is; importing MLflow takes seconds, which only
`open_registry` spends.
"""

from apt_ray.machine import settle
from apt_ray.registry.backup import Backup, export_registry, import_registry
from apt_ray.registry.history import History, Move
from apt_ray.registry.pending import default_pending
from apt_ray.registry.promotion import Promotion, discard, promote, roll_back
from apt_ray.registry.protocol import (
    CANDIDATE,
    CHAMPION,
    ExportedVersion,
    LoggedTrial,
    RegisteredCategory,
    RegisteredVersion,
    Registry,
)
from apt_ray.registry.retention import Pruned, prune

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "Backup",
    "ExportedVersion",
    "History",
    "LoggedTrial",
    "Move",
    "Promotion",
    "Pruned",
    "RegisteredCategory",
    "RegisteredVersion",
    "Registry",
    "default_pending",
    "discard",
    "export_registry",
    "import_registry",
    "open_registry",
    "promote",
    "prune",
    "roll_back",
]


def open_registry(address: str | None = None) -> Registry:
    """The registry at the address of an MLflow server; None reads MLFLOW_TRACKING_URI.

    Nothing is asked of the server yet. RegistryError if no address is given.
    """
    settle()
    from apt_ray.registry.mlflow.client import MlflowRegistry

    return MlflowRegistry(address)
