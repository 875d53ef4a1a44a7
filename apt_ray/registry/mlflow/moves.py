"""How a champion changes: one alias move at a time, each of them remembered.

The moves of a category are numbered from 1 and kept as tags of one MLflow run, its history. MLflow
sets aliases without looking at what they were, so whoever makes move n first creates a registered
model whose name says so: the names of models are unique, hence only one of two succeeds, and the
other is told. That model is deleted once the move is in the history.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from apt_ray.errors import RegistryConflictError, RegistryError
from apt_ray.machine import who
from apt_ray.registry.history import Action, History, Move
from apt_ray.registry.mlflow.names import MARK, is_category, is_ours, model_name
from apt_ray.registry.protocol import CANDIDATE, CHAMPION

_POINTER = "history_run"
_MOVE = "move."
_NOTE = "mlflow.note.content"
_ABANDONED_S = 60.0
_LONGEST_WHY = 2000


def read_history(client: MlflowClient, category: str) -> History:
    """The history of a category that exists; RegistryError if its model is somebody else's."""
    return _read(client, category)[0]


def _read(client: MlflowClient, category: str) -> tuple[History, str | None]:
    """The history and the run that keeps it, if there is one already."""
    model = client.get_registered_model(model_name(category))
    if not is_category(model.tags, [version.tags for version in model.latest_versions]):
        raise RegistryError(
            f"the registered model {model.name} was not made by apt-ray (it lacks the tag"
            f" `{MARK}`): name the category otherwise, or hand the model over to apt-ray by setting"
            " that tag on it"
        )
    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    run_id = model.tags.get(_POINTER)
    tags = client.get_run(run_id).data.tags if run_id else {}
    history = History.of(
        category,
        champion=aliases.get(CHAMPION),
        candidate=aliases.get(CANDIDATE),
        recorded=[Move(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(_MOVE)],
    )
    return history, run_id


def move_champion(
    client: MlflowClient,
    history: History,
    *,
    target: int,
    action: Action,
    why: str,
    experiment_id: str,
    describe: Callable[[str, Sequence[Move]], str],
) -> Move:
    """Let `target` serve, if nothing has moved since `history` was read.

    Raises:
        RegistryConflictError: another move was made, or is being made; nothing was changed.
    """
    category = history.category
    tickets = _take_ticket(client, category, history.recorded + 1)
    try:
        now, run_id = _read(client, category)
        new = now.followed_by(
            target, seen=history, action=action, who=_who(), why=why[:_LONGEST_WHY]
        )
        set_alias(client, category, CHAMPION, target)
        run_id = run_id or _create_history(client, category, experiment_id)
        for move in new:
            client.set_tag(run_id, f"{_MOVE}{move.number:06d}", json.dumps(asdict(move)))
        kept = [move for move in now.moves if move.number]
        client.update_registered_model(model_name(category), describe(category, kept + new))
        return new[-1]
    finally:
        for ticket in tickets:
            _forget(client, ticket)


def restore_history(
    client: MlflowClient,
    category: str,
    moves: Sequence[Move],
    *,
    experiment_id: str,
    describe: Callable[[str, Sequence[Move]], str],
) -> None:
    """Record moves that were made elsewhere, under their own numbers; again changes nothing."""
    _, run_id = _read(client, category)
    if not moves:
        return
    run_id = run_id or _create_history(client, category, experiment_id)
    for move in moves:
        client.set_tag(run_id, f"{_MOVE}{move.number:06d}", json.dumps(asdict(move)))
    client.update_registered_model(model_name(category), describe(category, moves))


def set_alias(client: MlflowClient, category: str, alias: str, version: int) -> None:
    """Point an alias to a version.

    MLflow looks whether the alias exists before it writes it: of two that create it at once, a
    PostgreSQL server refuses one as a duplicate, which then has only to move it.
    """
    try:
        client.set_registered_model_alias(model_name(category), alias, str(version))
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        client.set_registered_model_alias(model_name(category), alias, str(version))


def _take_ticket(client: MlflowClient, category: str, number: int) -> list[str]:
    """The names to delete once the move is made; one whose maker died is passed over."""
    abandoned: list[str] = []
    for attempt in itertools.count():
        ticket = f"moving-{model_name(category)}-{number}-{attempt}"
        try:
            client.create_registered_model(
                ticket, {MARK: "move"}, f"{_who()} is moving the champion of {category}"
            )
            return [*abandoned, ticket]
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        try:
            taken = client.get_registered_model(ticket)
        except MlflowException:
            raise read_history(client, category).conflict() from None
        if time.time() - taken.creation_timestamp / 1000 < _ABANDONED_S:
            raise RegistryConflictError(
                f"{taken.description} at this moment: look at the history, then decide again"
            )
        if is_ours(taken.tags):
            abandoned.append(ticket)
    raise AssertionError("unreachable")


def _create_history(client: MlflowClient, category: str, experiment_id: str) -> str:
    run = client.create_run(
        experiment_id,
        run_name=f"history of {category}",
        tags={"category": category, _NOTE: f"Every change of {category}'s champion, as tags."},
    )
    run_id: str = run.info.run_id
    client.set_terminated(run_id)
    client.set_registered_model_tag(model_name(category), _POINTER, run_id)
    return run_id


def _forget(client: MlflowClient, ticket: str) -> None:
    try:
        client.delete_registered_model(ticket)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _who() -> str:
    return who(os.environ.get("MLFLOW_TRACKING_USERNAME"))
