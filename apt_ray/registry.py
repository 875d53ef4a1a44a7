"""The registry of prompt sets: one MLflow registered model per category.

The registered model of a category is named `apt-<category>`. A version of it is one directory of
artifacts: the prompt set, the table of the search's trials, and pictures. Two aliases say what
a version is for: `candidate` is the newest one, `champion` is the one that serves.

This is the only module that imports MLflow, an import of seconds; keep it out of trials.
"""

import csv
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import version as library_version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit, urlunsplit
from urllib.request import urlopen

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from PIL import Image

from apt_ray.errors import RegistryError
from apt_ray.images import encode_png
from apt_ray.prompt_set import PromptSet

CANDIDATE = "candidate"
CHAMPION = "champion"
EXPERIMENT = "apt-ray"
TRIALS_EXPERIMENT = "apt-ray-trials"

_PREFIX = "apt-"
_DIRECTORY = "version"
_PROMPT_SET = f"{_DIRECTORY}/prompt_set.safetensors"
_TRIALS = f"{_DIRECTORY}/trials.csv"
_PICTURES = f"{_DIRECTORY}/pictures"
_LIBRARIES = ("torch", "open_clip_torch", "numpy", "mlflow")
_PROBE_SECONDS = 5.0
_PAGE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """One version of a category's prompt set, as the registry knows it."""

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


class Registry:
    """The prompt sets in an MLflow server.

    Args:
        tracking_uri: Address of the MLflow server; None reads MLFLOW_TRACKING_URI.

    Raises:
        RegistryError: From every method, if the server cannot be reached or refuses.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise RegistryError(
                "no registry is named: pass the address of the MLflow server, or set "
                "MLFLOW_TRACKING_URI, for example to http://127.0.0.1:5000"
            )
        _quiet_mlflow()
        self._uri = uri.rstrip("/")
        self.address = _without_credentials(self._uri)
        self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def check(self) -> None:
        """Raise RegistryError within seconds if the server cannot be reached."""
        with self._requests():
            self._client.search_registered_models(max_results=1)

    def register(
        self,
        prompt_set: PromptSet,
        *,
        pictures: Mapping[str, Image.Image],
        trials: Sequence[Mapping[str, object]],
        tags: Mapping[str, str] = {},
        promote: bool = True,
    ) -> RegisteredVersion:
        """Store a prompt set as the category's newest version and make it the candidate.

        It becomes the champion as well where the category has none yet and `promote` is set.

        Args:
            prompt_set: What is registered; its metrics and settings are logged with it.
            pictures: File name without suffix -> picture, shown under the version.
            trials: One row a trial of the search, all with the same keys.
            tags: Provenance that the prompt set itself does not carry.
            promote: Whether it may become the champion.
        """
        name = _model_name(prompt_set.category)
        tags = _tags(prompt_set) | dict(tags)
        with self._requests():
            aliases = self._registered_model(prompt_set.category)
            run = self._client.create_run(self._experiment_id(), run_name=prompt_set.category)
            run_id: str = run.info.run_id
            page = _describe_version(prompt_set, run_id, tuple(pictures))
            try:
                self._log(run_id, prompt_set, tags | {"mlflow.note.content": page})
                self._upload(run_id, prompt_set, pictures, trials)
                created = self._client.create_model_version(
                    name,
                    source=f"runs:/{run_id}/{_DIRECTORY}",
                    run_id=run_id,
                    tags=tags,
                    description=page,
                )
            except BaseException:
                self._client.set_terminated(run_id, "FAILED")
                raise
            self._client.set_terminated(run_id)
            may_serve = promote and CHAMPION not in aliases
            moved = (CANDIDATE, CHAMPION) if may_serve else (CANDIDATE,)
            for alias in moved:
                self._client.set_registered_model_alias(name, alias, created.version)
        return RegisteredVersion(
            category=prompt_set.category,
            version=int(created.version),
            aliases=moved,
            run_id=run_id,
            tags=tags,
        )

    def resolve(self, category: str, reference: str = CHAMPION) -> RegisteredVersion:
        """The version behind an alias or a version number.

        Raises:
            RegistryError: The category, alias or version does not exist; names those that do.
        """
        name = _model_name(category)
        with self._requests():
            try:
                if reference.isdecimal():
                    found = self._client.get_model_version(name, reference)
                else:
                    found = self._client.get_model_version_by_alias(name, reference)
            except MlflowException as error:
                # MLflow reports a missing alias as an invalid parameter.
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise RegistryError(self._what_exists(category, reference)) from None
                raise
        return _registered(category, found)

    def load(self, category: str, reference: str = CHAMPION) -> tuple[PromptSet, RegisteredVersion]:
        """The prompt set behind an alias or a version number, and which version that is.

        Raises:
            RegistryError: As `resolve`, or the version holds no prompt set.
            PromptSetError: The stored file is damaged.
        """
        registered = self.resolve(category, reference)
        with self._requests(), tempfile.TemporaryDirectory(prefix="apt-ray-") as folder:
            try:
                path = self._client.download_artifacts(registered.run_id, _PROMPT_SET, folder)
            except (MlflowException, OSError) as error:
                raise RegistryError(
                    f"version {registered.version} of {category} holds no prompt set in the "
                    f"registry at {self.address} ({self._redacted(error)}): its artifacts were "
                    "deleted or their store is away; restore them, or use another version"
                ) from error
            source = f"version {registered.version} of {category}"
            return PromptSet.from_bytes(Path(path).read_bytes(), source=source), registered

    def champions(self) -> dict[str, int]:
        """Category -> version of its champion, for every category that has one."""
        return {
            category: aliases[CHAMPION]
            for category, aliases in self._all_aliases().items()
            if CHAMPION in aliases
        }

    def log_trials(self, search: str, trials: Sequence[LoggedTrial]) -> None:
        """Write trials as runs of the experiment `apt-ray-trials`, each once, whatever is repeated.

        Args:
            search: Name of the search, a tag of every run.
            trials: Ended trials.
        """
        with self._requests():
            experiment = self._experiment_id(TRIALS_EXPERIMENT)
            known = self._logged(experiment, search)
            for trial in trials:
                name = f"{trial.category}/{trial.number}"
                if name in known:
                    continue
                now = int(time.time() * 1000)
                run = self._client.create_run(experiment, run_name=f"{search}/{name}")
                self._client.log_batch(
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
                self._client.set_terminated(
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

    def _registered_model(self, category: str) -> Mapping[str, str]:
        """The aliases of the category's registered model, which is created if need be."""
        name = _model_name(category)
        try:
            self._client.create_registered_model(
                name, tags={"category": category}, description=_describe_category(category)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        aliases: Mapping[str, str] = self._client.get_registered_model(name).aliases
        return aliases

    def _log(self, run_id: str, prompt_set: PromptSet, tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in _metrics(prompt_set).items()],
            params=[Param(key, str(value)) for key, value in _params(prompt_set).items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def _upload(
        self,
        run_id: str,
        prompt_set: PromptSet,
        pictures: Mapping[str, Image.Image],
        trials: Sequence[Mapping[str, object]],
    ) -> None:
        """Upload the one directory of a version: registration keeps no other (mlflow#18581)."""
        with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
            folder = Path(name)
            (folder / _PICTURES).mkdir(parents=True)
            (folder / _PROMPT_SET).write_bytes(prompt_set.to_bytes())
            for picture_name, picture in pictures.items():
                (folder / _picture(picture_name)).write_bytes(encode_png(picture))
            if trials:
                with (folder / _TRIALS).open("w", newline="") as file:
                    table = csv.DictWriter(file, fieldnames=list(trials[0]))
                    table.writeheader()
                    table.writerows(trials)
            self._client.log_artifacts(run_id, name)

    def _experiment_id(self, name: str = EXPERIMENT) -> str:
        try:
            return self._client.create_experiment(name)
        except MlflowException:
            existing = self._client.get_experiment_by_name(name)
            if existing is None:
                raise
            return existing.experiment_id

    def _all_aliases(self) -> dict[str, dict[str, int]]:
        """Category -> alias -> version, for every category: one request a thousand of them."""
        aliases: dict[str, dict[str, int]] = {}
        token: str | None = None
        with self._requests():
            while token != "":
                page = self._client.search_registered_models(
                    f"name LIKE '{_PREFIX}%'", max_results=_PAGE, page_token=token
                )
                for model in page:
                    aliases[model.name.removeprefix(_PREFIX)] = {
                        alias: int(version) for alias, version in model.aliases.items()
                    }
                token = page.token or ""
        return aliases

    def _what_exists(self, category: str, reference: str) -> str:
        known = self._all_aliases()
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

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Fail within seconds where MLflow's own retries would take minutes."""
        self._probe()
        try:
            yield
        except MlflowException as error:
            raise RegistryError(
                f"the registry at {self.address} refused: {self._redacted(error)}"
            ) from error

    def _redacted(self, error: Exception) -> str:
        """The error's message without the credentials that the address may hold."""
        return str(error).replace(self._uri, self.address)

    def _probe(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            return
        try:
            urlopen(f"{self.address}/health", timeout=_PROBE_SECONDS).close()
        except HTTPError:
            pass  # It answers; whether the request is allowed is for MLflow's client to find out.
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLError):
                return  # It answers; MLflow's client has its own settings for certificates.
            raise RegistryError(
                f"no MLflow server answers at {self.address} ({reason}): start one with "
                "`mlflow server`, or correct the address (MLFLOW_TRACKING_URI)"
            ) from None


def _quiet_mlflow() -> None:
    """MLflow prints a bar per file and an address per run, which drowns a job's log."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _model_name(category: str) -> str:
    return f"{_PREFIX}{category}"


def _registered(category: str, found: ModelVersion) -> RegisteredVersion:
    return RegisteredVersion(
        category=category,
        version=int(found.version),
        aliases=tuple(found.aliases),
        run_id=found.run_id or "",  # of a version that somebody else put there
        tags=dict(found.tags),
    )


def _picture(name: str) -> str:
    return f"{_PICTURES}/{name}.png"


def _params(prompt_set: PromptSet) -> dict[str, object]:
    backbone = prompt_set.backbone.model_dump()
    return prompt_set.settings.model_dump() | {f"backbone.{key}": backbone[key] for key in backbone}


def _metrics(prompt_set: PromptSet) -> dict[str, float]:
    return {**prompt_set.metrics, "threshold": prompt_set.threshold.value}


def _tags(prompt_set: PromptSet) -> dict[str, str]:
    return {
        "category": prompt_set.category,
        "backbone": prompt_set.backbone.name,
        "fingerprint": prompt_set.fingerprint,
        "support_hash": prompt_set.support_hash,
        "threshold": repr(prompt_set.threshold.value),
        "certified": str(prompt_set.threshold.certified).lower(),
        **{f"library.{name}": library_version(name) for name in _LIBRARIES},
    }


def _describe_category(category: str) -> str:
    return f"""\
Finds defects in pictures of **{category}**. Each version is a prompt set that apt-ray tuned from a
few good pictures.

- `{CHAMPION}` is the version that serves, `{CANDIDATE}` the newest one.
- To roll back, move `{CHAMPION}` to an older version.
- To inspect a picture, ask the fleet:
  `curl --data-binary @part.png http://FLEET/v1/{category}/inspect`
- To load it in Python: `apt_ray.registry.Registry().load("{category}", "{CHAMPION}")`
"""


def _describe_version(prompt_set: PromptSet, run_id: str, pictures: Sequence[str]) -> str:
    """Markdown for the registry's pages; a list of versions shows the first line of it."""
    threshold = prompt_set.threshold
    promise = "uncertified, for want of good pictures outside the support set"
    if threshold.certified_false_alarm_rate is not None:
        promise = f"at most {threshold.certified_false_alarm_rate:g} of good parts rejected"
    metrics = _with_spread(prompt_set.metrics)
    headline = ", ".join(f"{name} {value}" for name, value in list(metrics.items())[:1])
    sections = [
        f"{headline}{', ' if headline else ''}threshold {threshold.value:.4f} ({promise}), "
        f"{prompt_set.provenance.shots} shots, backbone {prompt_set.backbone.name}",
        _table("metric", metrics),
        _table("setting", {name: _number(value) for name, value in prompt_set.settings}),
    ]
    for name in pictures:
        # Relative to the page, so that any name of the server will do.
        url = "get-artifact?" + urlencode({"path": _picture(name), "run_uuid": run_id})
        sections.append(f"**{name.replace('_', ' ')}**\n\n![{name}]({url})")
    return "\n\n".join(sections)


def _with_spread(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics for the eye: `x` and `x_sd` become one."""
    return {
        name: f"{value:.4f} ± {metrics[f'{name}_sd']:.4f}"
        if f"{name}_sd" in metrics
        else f"{value:.4f}"
        for name, value in metrics.items()
        if not name.endswith("_sd")
    }


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {header} | |", "|---|---|", *lines]) if lines else ""
