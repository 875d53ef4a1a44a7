"""prune: what is kept, and what only seems to be deleted."""

import math
from datetime import datetime, timezone

import pytest
from mlflow import MlflowClient

from apt_ray.errors import SettingsError
from apt_ray.registry import History, Move, open_registry, prune
from apt_ray.registry.retention import served_since
from tests.registry.registering import make_prompt_set, register


def test_prune_keeps_what_is_needed(mlflow_server: str) -> None:
    registry = open_registry(mlflow_server)
    for seed in range(6):
        register(registry, make_prompt_set("pruned", seed=seed))
    for target in (3, 5):
        registry.move(registry.history("pruned"), target, action="promote", why="better")
    MlflowClient(mlflow_server).set_registered_model_alias("apt-pruned", "spare", "2")

    def pruned(**options: float) -> list[int]:
        found = prune(registry, ["pruned"], keep=1, dry_run=True, **options)  # type: ignore[arg-type]
        return [one.version for one in found]

    # 6 is the newest, 5 the champion, 2 has an alias; 1 and 3 served today, 4 never.
    assert pruned(days=1) == [4]
    assert pruned(days=0) == [4, 3, 1]
    assert registry.versions("pruned") == [6, 5, 4, 3, 2, 1]
    assert prune(registry, ["pruned"], keep=4, days=0) == prune(
        registry, ["pruned"], keep=4, days=0, dry_run=False
    )
    assert registry.versions("pruned") == [6, 5, 4, 3, 2]
    for keep, days in ((0, 0.0), (1, -1.0), (1, math.nan), (1, math.inf), (1, 1e6)):
        with pytest.raises(SettingsError, match="at least 1"):
            prune(registry, keep=keep, days=days)


def test_a_version_served_until_the_next_move() -> None:
    moves = tuple(
        Move(
            number=day,
            at=f"2025-01-{day:02d}T00:00:00+00:00",
            who="",
            action="promote",
            source=None,
            target=day,
            why="",
        )
        for day in (1, 5, 9)
    )
    history = History(category="x", champion=9, candidate=9, moves=moves)
    for day, served in ((10, {9}), (9, {9, 5}), (7, {9, 5}), (3, {9, 5, 1})):
        assert served_since(history, datetime(2025, 1, day, tzinfo=timezone.utc)) == served
