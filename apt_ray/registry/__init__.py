"""The registry of prompt sets: one MLflow registered model per category.

The registered model of a category is named `apt-<category>`. Two aliases say what a version of it
is for: `candidate` is the newest one, `champion` is the one that serves. `contents` says what a
version holds, `moves` how a champion changes.

This is the only package that imports MLflow, an import of seconds; keep it out of trials.
"""

from apt_ray.registry.history import History, Move
from apt_ray.registry.mlflow.client import Registry
from apt_ray.registry.mlflow.names import EXPERIMENT, TRIALS_EXPERIMENT
from apt_ray.registry.pending import default_pending
from apt_ray.registry.promotion import Promotion, promote, roll_back
from apt_ray.registry.protocol import CANDIDATE, CHAMPION, LoggedTrial, RegisteredVersion
from apt_ray.registry.retention import Pruned, prune

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "EXPERIMENT",
    "TRIALS_EXPERIMENT",
    "History",
    "LoggedTrial",
    "Move",
    "Promotion",
    "Pruned",
    "RegisteredVersion",
    "Registry",
    "default_pending",
    "promote",
    "prune",
    "roll_back",
]
