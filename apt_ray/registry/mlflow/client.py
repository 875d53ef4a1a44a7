"""Registry: everything that apt-ray asks of MLflow."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import time

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from PIL import Image

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import (
    PromptSetError,
    RegistryConflictError,
    RegistryError,
    RegistryUnavailableError,
)
from apt_ray.files import Location
from apt_ray.registry.mlflow import pending as waiting_room
from apt_ray.registry.mlflow.connection import Connection
from apt_ray.registry.mlflow.contents import Record, sha256, write_version
from apt_ray.registry.mlflow.moves import (
    Action,
    History,
    Move,
    move_champion,
    read_history,
    set_alias,
)
from apt_ray.registry.mlflow.page import describe_category, describe_version, with_report
from apt_ray.registry.names import (
    CANDIDATE,
    CHAMPION,
    DIRECTORY,
    EXPERIMENT,
    MODEL_PREFIX,
    PROMPT_SET,
    TRIALS_EXPERIMENT,
    LoggedTrial,
    RegisteredVersion,
    model_name,
)

_PAGE = 1000
_SUBMISSION = "submission"
_HIDDEN_TAGS = ("mlflow.", _SUBMISSION)


class Registry:
    """The prompt sets in an MLflow server.

    Args:
        tracking_uri: Address of the MLflow server; None reads MLFLOW_TRACKING_URI.

    Raises:
        RegistryUnavailableError: From every method, if the server does not answer.
        RegistryError: From every method, if it refuses.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self._connection = Connection(tracking_uri)
        self.address = self._connection.address
        self._client = self._connection.client

    def check(self) -> None:
        """Raise RegistryError within seconds if the server cannot be reached."""
        with self._connection.requests() as client:
            client.search_registered_models(max_results=1)

    def aliases(self) -> dict[str, dict[str, int]]:
        """Category -> alias -> version, for every category: one request a thousand of them."""
        aliases: dict[str, dict[str, int]] = {}
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
                aliases[model["name"].removeprefix(MODEL_PREFIX)] = {
                    alias["alias"]: int(alias["version"]) for alias in model.get("aliases", [])
                }
            token = answer.get("next_page_token", "")
            if not token:
                return aliases

    def champions(self) -> dict[str, int]:
        """Category -> version of its champion, for every category that has one."""
        return {
            category: aliases[CHAMPION]
            for category, aliases in self.aliases().items()
            if CHAMPION in aliases
        }

    def register(
        self,
        prompt_set: PromptSet,
        *,
        pictures: Mapping[str, Image.Image],
        trials: Sequence[Mapping[str, object]],
        tags: Mapping[str, str] = {},
        support: Sequence[Location] = (),
        held_out: Sequence[Location] = (),
        promote: bool = True,
        submission: str | None = None,
        pending: Path | None = None,
    ) -> RegisteredVersion:
        """Store a prompt set as the category's newest version and make it the candidate.

        It becomes the champion as well where the category has none yet and `promote` is set.

        Args:
            prompt_set: What is registered; its metrics and settings are logged with it.
            pictures: File name without suffix -> picture, shown under the version.
            trials: One row a trial of the search, all with the same keys.
            tags: Provenance that the prompt set itself does not carry.
            support: Files of its support images.
            held_out: Files of further normal images; small copies of some are kept with the
                version, so that it can be compared with later ones.
            promote: Whether it may become the champion.
            submission: The caller's own name of this version, unlike that of any other: whatever is
                registered again under it, now or from `pending`, is the version that was first.
            pending: Where the version is kept if the registry cannot take it; see
                `register_pending`.
        """
        with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
            folder = Path(name) / "version"
            folder.mkdir()
            record = write_version(
                folder,
                prompt_set,
                pictures=pictures,
                trials=trials,
                tags=tags,
                support=support,
                held_out=held_out,
                submission=submission,
                may_serve=promote,
            )
            try:
                return self._submit_once(folder, record)
            except RegistryError as error:
                if pending is None:
                    raise
                place = f"{record.category}-{sha256(record.submission.encode())[:16]}"
                kept = waiting_room.keep(folder, place, pending)
                raise type(error)(
                    f"{error}. The version is kept in {kept}: once the registry is back, run"
                    " `python tuning/search.py --register-pending`"
                ) from error

    def register_pending(self, pending: Path) -> Iterator[RegisteredVersion]:
        """Register the versions that wait in a folder, oldest first, each exactly once.

        A version is removed from the folder once it is registered. The first that the registry
        does not take ends the iteration with its error.
        """
        for folder in waiting_room.waiting(pending):
            record = Record.read(folder)
            registered = self._submit_once(folder, record)
            waiting_room.remove(folder)
            yield registered

    def resolve(self, category: str, reference: str = CHAMPION) -> RegisteredVersion:
        """The version behind an alias or a version number.

        Raises:
            RegistryError: The category, alias or version does not exist; names those that do.
        """
        with self._connection.requests() as client:
            found = self._find(category, reference)
            tags = dict(found.tags)
            if found.run_id:
                logged = client.get_run(found.run_id).data.tags
                tags = {k: v for k, v in logged.items() if not k.startswith(_HIDDEN_TAGS)} | tags
        return RegisteredVersion(
            category=category,
            version=int(found.version),
            aliases=tuple(found.aliases),
            run_id=found.run_id or "",  # of a version that somebody else put there
            tags=tags,
        )

    def load(
        self, category: str, reference: str = CHAMPION, *, fingerprint: str | None = None
    ) -> tuple[PromptSet, RegisteredVersion]:
        """The prompt set behind an alias or a version number, and which version that is.

        Args:
            fingerprint: of the backbone that is to use it; None takes any.

        Raises:
            RegistryError: As `resolve`, or the version holds no prompt set.
            PromptSetError: The stored file is damaged, was changed after it was registered, or
                belongs to another category or backbone.
        """
        registered = self.resolve(category, reference)
        return _checked(self._download(registered), registered, fingerprint), registered

    def history(self, category: str) -> History:
        """How the champion of a category came to be that, oldest move first."""
        with self._connection.requests() as client:
            try:
                return read_history(client, category)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise RegistryError(self._what_exists(category, CHAMPION)) from None
                raise

    def move(self, history: History, target: int, *, action: Action, why: str) -> Move:
        """Make a version the champion, if nothing has moved since `history` was read.

        Raises:
            RegistryConflictError: Somebody else was faster; nothing was changed.
        """
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

    def diff(
        self, category: str, left: str = CHAMPION, right: str = CANDIDATE
    ) -> list[tuple[str, str | None, str | None]]:
        """(name, left, right) of every setting, metric and tag in which two versions differ."""
        sides = [self._described(category, reference) for reference in (left, right)]
        return [
            (name, sides[0].get(name), sides[1].get(name))
            for name in sorted({*sides[0], *sides[1]})
            if sides[0].get(name) != sides[1].get(name)
        ]

    def annotate(
        self, registered: RegisteredVersion, tags: Mapping[str, str], *, report: str, name: str
    ) -> None:
        """Add tags and a Markdown report to a version; a later report takes its place on the page,
        and the files of all of them stay with the run."""
        model, version = model_name(registered.category), str(registered.version)
        with self._connection.requests() as client:
            for key, value in tags.items():
                client.set_model_version_tag(model, version, key, value)
            page = client.get_model_version(model, version).description or ""
            client.update_model_version(model, version, with_report(page, report))
            if registered.run_id:
                client.log_text(registered.run_id, report, f"reports/{name}.md")

    def download(self, registered: RegisteredVersion, path: str, folder: Path) -> Path | None:
        """Fetch a file or folder of a version into `folder`; None if the version has none."""
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

    def versions(self, category: str) -> list[int]:
        """The versions of a category, newest first."""
        with self._connection.requests() as client:
            found: list[int] = []
            token: str | None = None
            while token != "":
                page = client.search_model_versions(
                    f"name = '{model_name(category)}'", max_results=_PAGE, page_token=token
                )
                found += [int(version.version) for version in page]
                token = page.token or ""
            return sorted(found, reverse=True)

    def delete(self, category: str, version: int) -> None:
        """Delete a version and mark its run as deleted; `mlflow gc` then frees the space."""
        name = model_name(category)
        with self._connection.requests() as client:
            run_id = client.get_model_version(name, str(version)).run_id
            client.delete_model_version(name, str(version))
            if run_id:
                client.delete_run(run_id)

    # ---- registration

    def _submit_once(self, folder: Path, record: Record) -> RegisteredVersion:
        """Send a written version to the registry, unless an earlier attempt has done so."""
        return self._already_submitted(record) or self._submit(folder, record)

    def _submit(self, folder: Path, record: Record) -> RegisteredVersion:
        name = model_name(record.category)
        with self._connection.requests() as client:
            self._create_registered_model(record.category)
            run = client.create_run(
                self._experiment_id(),
                run_name=record.category,
                tags={_SUBMISSION: record.submission},
            )
            run_id: str = run.info.run_id
            page = describe_version(record, run_id)
            try:
                self._log(run_id, record, page)
                client.log_artifacts(run_id, str(folder / DIRECTORY), DIRECTORY)
                created = client.create_model_version(
                    name,
                    source=f"runs:/{run_id}/{DIRECTORY}",
                    run_id=run_id,
                    tags=dict(record.version_tags),
                    description=page,
                )
            except BaseException:
                client.set_terminated(run_id, "FAILED")
                raise
            client.set_terminated(run_id)
        return self._settle(record, int(created.version))

    def _already_submitted(self, record: Record) -> RegisteredVersion | None:
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
        category, name = record.category, model_name(record.category)
        with self._connection.requests() as client:
            newest = self._newest(name)
            while True:
                set_alias(client, category, CANDIDATE, int(newest))
                set_to, newest = newest, self._newest(name)
                if newest == set_to:
                    break
        history = self.history(category)
        if history.champion is None and record.may_serve:
            with suppress(RegistryConflictError):  # another version was the first
                self.move(history, version, action="first", why="the first version")
        return self.resolve(category, str(version))

    def _newest(self, name: str) -> str:
        (newest,) = self._client.search_model_versions(
            f"name = '{name}'", max_results=1, order_by=["version_number DESC"]
        )
        return str(newest.version)

    def _create_registered_model(self, category: str) -> None:
        try:
            self._client.create_registered_model(
                model_name(category), description=describe_category(category)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

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

    # ---- trials

    def log_trials(self, search: str, trials: Sequence[LoggedTrial]) -> None:
        """Write trials as runs of the experiment `apt-ray-trials`, each once, whatever is repeated.

        Args:
            search: Name of the search, a tag of every run.
            trials: Ended trials.
        """
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

    # ---- look-ups

    def _find(self, category: str, reference: str) -> ModelVersion:
        name = model_name(category)
        try:
            if reference.isdecimal():
                return self._client.get_model_version(name, reference)
            return self._client.get_model_version_by_alias(name, reference)
        except MlflowException as error:
            # MLflow reports a missing alias as an invalid parameter.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise RegistryError(self._what_exists(category, reference)) from None
            raise

    def _described(self, category: str, reference: str) -> dict[str, str]:
        """Everything that the registry says of a version, as text."""
        registered = self.resolve(category, reference)
        described = {"version": str(registered.version), **registered.tags}
        if registered.run_id:
            with self._connection.requests() as client:
                data = client.get_run(registered.run_id).data
            described |= dict(data.params)
            described |= {name: f"{value:.4f}" for name, value in data.metrics.items()}
        return described

    def _download(self, registered: RegisteredVersion) -> bytes:
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

    def _what_exists(self, category: str, reference: str) -> str:
        known = self.aliases()
        if category not in known:
            return (
                f"the registry at {self.address} has no category {category!r}; "
                f"it has {', '.join(sorted(known)) or 'none yet'}"
            )
        aliases = ", ".join(
            f"{alias} (version {known[category][alias]})" for alias in known[category]
        )
        return (
            f"category {category!r} has no version or alias {reference!r} in the registry at "
            f"{self.address}; its aliases are: {aliases or 'none'}"
        )


def _checked(data: bytes, registered: RegisteredVersion, fingerprint: str | None) -> PromptSet:
    source = f"version {registered.version} of {registered.category}"
    expected = registered.tags.get("sha256")
    if expected is not None and sha256(data) != expected:
        raise PromptSetError(
            f"{source} is not the file that was registered (its SHA-256 is {sha256(data)}, not"
            f" {expected}): somebody or something has changed it; use another version, or register"
            " the category again"
        )
    prompt_set = PromptSet.from_bytes(data, source=source)
    if prompt_set.category != registered.category:
        raise PromptSetError(
            f"{source} holds a prompt set of {prompt_set.category}: register it there instead"
        )
    if fingerprint is not None and prompt_set.fingerprint != fingerprint:
        raise PromptSetError(
            f"{source} was fitted to another backbone ({prompt_set.backbone.name}, fingerprint"
            f" {prompt_set.fingerprint}) than the one loaded ({fingerprint}): load the backbone"
            " that it names, or fit the category again"
        )
    return prompt_set
