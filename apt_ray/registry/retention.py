"""What of the registry may be deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from apt_ray.config import MAX_DAYS
from apt_ray.errors import SettingsError
from apt_ray.registry.history import History
from apt_ray.registry.protocol import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """A version that may go, or went."""

    category: str
    version: int


def prune(
    registry: Registry,
    categories: Sequence[str] = (),
    *,
    keep: int,
    days: float,
    dry_run: bool = True,
) -> list[Pruned]:
    """Delete the versions that nobody needs; with `dry_run` only say which.

    Kept are all versions with an alias, the newest `keep` of each category, and whatever served in
    the last `days` days.

    Args:
        categories: Whose versions; none means all.
    """
    if not (keep >= 1 and 0 <= days <= MAX_DAYS):
        raise SettingsError(
            f"keep at least 1 version, and 0 to {MAX_DAYS} days, got {keep} and {days:g}"
        )
    now = datetime.now(timezone.utc)
    aliases = registry.aliases()
    pruned = []
    for category in categories or sorted(aliases):
        history = registry.history(category)
        versions = registry.versions(category)
        needed = (
            set(versions[:keep])
            | set(aliases.get(category, {}).values())
            | {history.candidate}
            | served_since(history, now - timedelta(days=days))
        )
        for version in versions:
            if version not in needed:
                if not dry_run:
                    registry.delete(category, version)
                pruned.append(Pruned(category=category, version=version))
    return pruned


def served_since(history: History, when: datetime) -> set[int]:
    """The versions that were champion at any time since `when`."""
    served = set() if history.champion is None else {history.champion}
    ended: datetime | None = None  # the end of a move's version is the start of the next one
    for move in reversed(history.moves):
        if ended is None or ended >= when:
            served.add(move.target)
        if move.at:
            ended = datetime.fromisoformat(move.at)
    return served
