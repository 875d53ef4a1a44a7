"""What a registry is asked and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CANDIDATE = "candidate"
CHAMPION = "champion"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """One version of a category's prompt set, as the registry knows it.

    Attributes:
        aliases: those that point to it.
        run_id: the MLflow run that holds its files.
        tags: its provenance.
    """

    category: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedTrial:
    """A trial of a search, for `Registry.log_trials`; metrics are (step, value) pairs."""

    category: str
    number: int
    settings: Mapping[str, object]
    metrics: Mapping[str, Sequence[tuple[int, float]]]
    status: str
