"""What things are called in MLflow, and which of them are apt-ray's.

A name proves nothing on a server that others use too. Registering leaves a tag, the mark, on the
registered model and on the version; what has none is somebody else's, whatever its name.
"""

import re
from collections.abc import Iterable, Mapping

EXPERIMENT = "apt-ray"
TRIALS_EXPERIMENT = "apt-ray-trials"
MODEL_PREFIX = "apt-"
MARK = "apt-ray"
"""The tag that says that a model, a version or a ticket of a move is apt-ray's."""

_DIGEST = re.compile("[0-9a-f]{32,64}")
# What registering left before there was a mark: the first on models, the others on versions.
_EARLIER_MARKS = (("history_run",), ("fingerprint", "sha256"))


def model_name(category: str) -> str:
    """The name of a category's registered model."""
    return f"{MODEL_PREFIX}{category}"


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether a model or a version with these tags was made by apt-ray."""
    return MARK in tags or any(
        all(_DIGEST.fullmatch(tags.get(name, "")) for name in names) for names in _EARLIER_MARKS
    )


def is_category(tags: Mapping[str, str], newest: Iterable[Mapping[str, str]]) -> bool:
    """Whether a registered model is a category: its own tags say so, or those of its newest version
    do, which was registered before there was a mark or copied from another registry."""
    return is_ours(tags) or any(map(is_ours, newest))
