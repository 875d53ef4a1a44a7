"""MlflowRegistry: everything that apt-ray asks of MLflow."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from time import time
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from apt_ray.config import OperatorThreshold
from apt_ray.errors import RegistryConflictError, RegistryError, RegistryUnavailableError
from apt_ray.registry.contents import DIRECTORY, PICTURES, PROMPT_SET, Record
from apt_ray.registry.history import Action, History, Move
from apt_ray.registry.mlflow.connection import Connection
from apt_ray.registry.mlflow.moves import (
    move_champion,
    read_history,
    restore_history,
    set_alias,
)
from apt_ray.registry.mlflow.names import (
    EXPERIMENT,
    MARK,
    MODEL_PREFIX,
    TRIALS_EXPERIMENT,
    is_category,
    is_ours,
    model_name,
)
from apt_ray.registry.mlflow.page import describe_category, describe_version, with_report
from apt_ray.registry.protocol import (
    CANDIDATE,
    CHAMPION,
    ExportedVersion,
    LoggedTrial,
    RegisteredCategory,
    RegisteredVersion,
    Registry,
)

_PAGE = 1000
_SUBMISSION = "submission"
_THRESHOLD = "threshold"
_REPORTS = "reports"
_HIDDEN_TAGS = ("mlflow.", _SUBMISSION, MARK)


class MlflowRegistry(Registry):
    """The prompt sets in an MLflow server: one registered model a category.

    Args:
        tracking_uri: Address of the MLflow server; None reads MLFLOW_TRACKING_URI.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self._connection = Connection(tracking_uri)
        self.address = self._connection.address
        self._client = self._connection.client

    def check(self) -> None:
        with self._connection.requests() as client:
            client.search_registered_models(max_results=1)

    def categories(self) -> dict[str, RegisteredCategory]:
        """Every category: one request a thousand of them."""
        categories: dict[str, RegisteredCategory] = {}
        token = ""
        while True:
            answer = self._connection.get(
                "/api/2.0/mlflow/registered-models/search",
                {
                    "filter": f"name LIKE '{MODEL_PREFIX}%'",
                    "max_results": str(_PAGE),
                    "page_token": token,
                },
            )
            for model in answer.get("registered_models", []):
                tags = _tags(model)
                newest = [_tags(version) for version in model.get("latest_versions", [])]
                if not is_category(tags, newest):
                    continue
                categories[model["name"].removeprefix(MODEL_PREFIX)] = RegisteredCategory(
                    aliases={
                        alias["alias"]: int(alias["version"]) for alias in model.get("aliases", [])
                    },
                    threshold=_threshold(tags),
                )
            token = answer.get("next_page_token", "")
            if not token:
                return categories

    def submit(self, folder: Path, record: Record) -> RegisteredVersion:
        return self._submitted(record) or self._submit(
            folder, record, lambda run_id: describe_version(record, run_id)
        )

    def resolve(self, category: str, reference: str = CHAMPION) -> RegisteredVersion:
        with self._connection.requests() as client:
            found = self._find(category, reference)
            # One that somebody else put there need not have a run.
            run = client.get_run(found.run_id).data if found.run_id else None
        tags = ({} if run is None else run.tags) | found.tags
        return RegisteredVersion(
            category=category,
            version=int(found.version),
            aliases=tuple(found.aliases),
            run_id=found.run_id or "",
            tags={key: tag for key, tag in tags.items() if not key.startswith(_HIDDEN_TAGS)},
            settings={} if run is None else dict(run.params),
            metrics={} if run is None else dict(run.metrics),
            created=_iso(found.creation_timestamp),
        )

    def fetch(self, registered: RegisteredVersion) -> bytes:
        with tempfile.TemporaryDirectory(prefix="apt-ray-") as folder:
            try:
                with self._connection.requests() as client:
                    path = client.download_artifacts(
                        registered.run_id, f"{DIRECTORY}/{PROMPT_SET}", folder
                    )
                return Path(path).read_bytes()
            except RegistryUnavailableError:
                raise
            except (RegistryError, OSError) as error:
                raise RegistryError(
                    f"version {registered.version} of {registered.category} holds no prompt set in"
                    f" the registry at {self.address} ({self._connection.redacted(error)}): its"
                    " artifacts were deleted or their store is away; restore them, or use another"
                    " version"
                ) from error

    def download(self, registered: RegisteredVersion, path: str, folder: Path) -> Path | None:
        with self._connection.requests() as client:
            present = (
                {file.path for file in client.list_artifacts(registered.run_id, DIRECTORY)}
                if registered.run_id
                else set()
            )
            wanted = f"{DIRECTORY}/{path}"
            if wanted not in present:
                return None
            return Path(client.download_artifacts(registered.run_id, wanted, str(folder)))

    def history(self, category: str) -> History:
        with self._connection.requests() as client:
            try:
                return read_history(client, category)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise self._absent(category, CHAMPION) from None
                raise

    def move(self, history: History, target: int, *, action: Action, why: str) -> Move:
        with self._connection.requests() as client:
            return move_champion(
                client,
                history,
                target=target,
                action=action,
                why=why,
                experiment_id=self._experiment_id(),
                describe=describe_category,
            )

    def withdraw(self, category: str, version: int) -> None:
        candidate = self.history(category).candidate
        if candidate != version:
            raise self._no_candidate(category, version, candidate)
        with self._connection.requests() as client:
            client.delete_registered_model_alias(model_name(category), CANDIDATE)

    def page(self, category: str, version: int) -> str:
        return f"#/models/{model_name(category)}/versions/{version}"

    def set_threshold(self, category: str, threshold: OperatorThreshold) -> None:
        self.history(category)  # or there is no such category, or it is somebody else's
        with self._connection.requests() as client:
            client.set_registered_model_tag(
                model_name(category), _THRESHOLD, threshold.model_dump_json()
            )

    def annotate(
        self, registered: RegisteredVersion, tags: Mapping[str, str], *, report: str, name: str
    ) -> None:
        model, version = model_name(registered.category), str(registered.version)
        with self._connection.requests() as client:
            for key, value in tags.items():
                client.set_model_version_tag(model, version, key, value)
            page = client.get_model_version(model, version).description or ""
            client.update_model_version(model, version, with_report(page, report))
            if registered.run_id:
                client.log_text(registered.run_id, report, f"{_REPORTS}/{name}.md")

    def versions(self, category: str) -> list[int]:
        with self._connection.requests() as client:
            found: list[int] = []
            token: str | None = None
            while token != "":
                page = client.search_model_versions(
                    f"name = '{model_name(category)}'", max_results=_PAGE, page_token=token
                )
                found += [int(version.version) for version in page if is_ours(version.tags)]
                token = page.token or ""
            return sorted(found, reverse=True)

    def delete(self, category: str, version: int) -> None:
        """Delete a version and mark its run as deleted; `mlflow gc` then frees the space.

        The run of a version that was copied is left alone: it is that of the original, too.
        """
        with self._connection.requests() as client:
            run_id = self._find(category, str(version)).run_id
            client.delete_model_version(model_name(category), str(version))
            if run_id and not client.search_model_versions(f"run_id = '{run_id}'"):
                client.delete_run(run_id)

    def export(self, registered: RegisteredVersion, folder: Path) -> ExportedVersion:
        category, number = registered.category, str(registered.version)
        with self._connection.requests() as client:
            version = self._find(category, number)
            if not version.run_id:
                raise RegistryError(
                    f"version {number} of {category} has no run that keeps its files: delete it"
                    " from the registry, or export the other categories"
                )
            run = client.get_run(version.run_id)
            client.download_artifacts(version.run_id, "", str(folder))
        shown = {key: tag for key, tag in run.data.tags.items() if not key.startswith(_HIDDEN_TAGS)}
        record = Record(
            # One that was copied from another registry is no submission to this one.
            submission=run.data.tags.get(_SUBMISSION) or f"{category}/{number}/{run.info.run_id}",
            category=category,
            pictures=tuple(
                path.stem for path in sorted((folder / DIRECTORY / PICTURES).glob("*.png"))
            ),
            metrics=dict(run.data.metrics),
            params=dict(run.data.params),
            tags=shown,
            version_tags={
                key: tag for key, tag in version.tags.items() if not key.startswith(_HIDDEN_TAGS)
            },
            may_serve=False,
        )
        return ExportedVersion(
            record=record,
            run_id=version.run_id,
            page=version.description or "",
            created=_iso(version.creation_timestamp),
        )

    def restore(self, folder: Path, exported: ExportedVersion) -> RegisteredVersion:
        return self._submitted(exported.record) or self._submit(
            folder,
            exported.record,
            # Its images and tables are linked by the run.
            lambda run_id: exported.page.replace(exported.run_id, run_id),
        )

    def restore_category(
        self,
        category: str,
        *,
        aliases: Mapping[str, int],
        moves: Sequence[Move],
        threshold: OperatorThreshold | None,
    ) -> None:
        name = model_name(category)
        with self._connection.requests() as client:
            restore_history(
                client,
                category,
                moves,
                experiment_id=self._experiment_id(),
                describe=describe_category,
            )
            if threshold is not None:
                self.set_threshold(category, threshold)
            for alias in set(client.get_registered_model(name).aliases) - set(aliases):
                client.delete_registered_model_alias(name, alias)
            for alias in sorted(aliases, key=lambda alias: alias == CHAMPION):
                set_alias(client, category, alias, aliases[alias])

    def log_trials(self, search: str, trials: Sequence[LoggedTrial]) -> None:
        """Keep trials as runs of the experiment `apt-ray-trials`, with the search as a tag."""
        with self._connection.requests() as client:
            experiment = self._experiment_id(TRIALS_EXPERIMENT)
            known = self._logged(experiment, search)
            for trial in trials:
                name = f"{trial.category}/{trial.number}"
                if name in known:
                    continue
                now = int(time() * 1000)
                run = client.create_run(experiment, run_name=f"{search}/{name}")
                client.log_batch(
                    run.info.run_id,
                    metrics=[
                        Metric(key, value, now, step)
                        for key, values in trial.metrics.items()
                        for step, value in values
                    ],
                    params=[Param(key, str(value)) for key, value in trial.settings.items()],
                    # Whoever finds the tag `trial` finds a run that is whole.
                    tags=[
                        RunTag("search", search),
                        RunTag("category", trial.category),
                        RunTag("status", trial.status),
                        RunTag("trial", name),
                    ],
                )
                client.set_terminated(
                    run.info.run_id, "FAILED" if trial.status == "failed" else "FINISHED"
                )
                known.add(name)

    # ---- registration

    def _submit(
        self, folder: Path, record: Record, describe: Callable[[str], str]
    ) -> RegisteredVersion:
        name = model_name(record.category)
        with self._connection.requests() as client:
            self._create_registered_model(record.category)
            run = client.create_run(
                self._experiment_id(),
                run_name=record.category,
                tags={_SUBMISSION: record.submission},
            )
            run_id: str = run.info.run_id
            page = describe(run_id)
            try:
                self._log(run_id, record, page)
                client.log_artifacts(run_id, str(folder / DIRECTORY), DIRECTORY)
                if (folder / _REPORTS).is_dir():  # of one that is restored
                    client.log_artifacts(run_id, str(folder / _REPORTS), _REPORTS)
                created = client.create_model_version(
                    name,
                    source=f"runs:/{run_id}/{DIRECTORY}",
                    run_id=run_id,
                    tags={**record.version_tags, MARK: "version"},
                    description=page,
                )
            except BaseException:
                client.set_terminated(run_id, "FAILED")
                raise
            client.set_terminated(run_id)
        return self._settle(record, int(created.version))

    def _submitted(self, record: Record) -> RegisteredVersion | None:
        """The version that an earlier attempt made before it died, if it came so far."""
        with self._connection.requests() as client:
            runs = client.search_runs(
                [self._experiment_id()], f"tags.{_SUBMISSION} = '{record.submission}'"
            )
            for run in runs:
                for version in client.search_model_versions(f"run_id = '{run.info.run_id}'"):
                    return self._settle(record, int(version.version))
        return None

    def _settle(self, record: Record, version: int) -> RegisteredVersion:
        """Point the aliases where they belong, whatever else is being registered meanwhile."""
        category = record.category
        with self._connection.requests() as client:
            newest = max(self.versions(category))
            while True:
                set_alias(client, category, CANDIDATE, newest)
                set_to, newest = newest, max(self.versions(category))
                if newest == set_to:
                    break
        history = self.history(category)
        if history.champion is None and record.may_serve:
            with suppress(RegistryConflictError):  # another version was the first
                self.move(history, version, action="first", why="the first version")
        return self.resolve(category, str(version))

    def _create_registered_model(self, category: str) -> None:
        name, kind = model_name(category), "category"
        try:
            self._client.create_registered_model(name, {MARK: kind}, describe_category(category))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            read_history(self._client, category)  # or it is somebody else's
            self._client.set_registered_model_tag(name, MARK, kind)

    def _log(self, run_id: str, record: Record, page: str) -> None:
        now = int(time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in record.metrics.items()],
            params=[Param(key, value) for key, value in record.params.items()],
            tags=[
                RunTag(key, value)
                for key, value in {**record.tags, "mlflow.note.content": page}.items()
            ],
        )

    def _experiment_id(self, name: str = EXPERIMENT) -> str:
        existing = self._client.get_experiment_by_name(name)
        if existing is not None:
            return existing.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException:
            existing = self._client.get_experiment_by_name(name)
            if existing is None:
                raise
            return existing.experiment_id

    # ---- look-ups

    def _find(self, category: str, reference: str) -> ModelVersion:
        name = model_name(category)
        try:
            if reference.isdecimal():
                found = self._client.get_model_version(name, reference)
            else:
                found = self._client.get_model_version_by_alias(name, reference)
        except MlflowException as error:
            # MLflow reports a missing alias as an invalid parameter.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise self._absent(category, reference) from None
            raise
        if not is_ours(found.tags):
            raise RegistryError(
                f"version {found.version} of the registered model {name} was not registered by"
                f" apt-ray (it lacks the tag `{MARK}`): name another version, or another category"
            )
        return found

    def _logged(self, experiment: str, search: str) -> set[str]:
        """The trials of a search that are written already."""
        known: set[str] = set()
        token: str | None = None
        while token != "":
            page = self._client.search_runs(
                [experiment], f"tags.search = '{search}'", max_results=_PAGE, page_token=token
            )
            known |= {run.data.tags["trial"] for run in page if "trial" in run.data.tags}
            token = page.token or ""
        return known


def _iso(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")


def _tags(described: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a model or version in MLflow's JSON, which leaves out what is empty."""
    return {tag["key"]: tag.get("value", "") for tag in described.get("tags", [])}


def _threshold(tags: Mapping[str, str]) -> OperatorThreshold | None:
    """What a person decided; a tag that somebody wrote by hand and that says nothing decides
    nothing."""
    try:
        return OperatorThreshold.model_validate_json(tags[_THRESHOLD])
    except (KeyError, ValidationError):
        return None
