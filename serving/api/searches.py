"""Searches that are started from the fleet: Ray jobs of `tuning.search`, on the same cluster.

Ray knows them by their metadata, so nothing of them is kept here; how far one is lies in a file
that it writes.
"""

import json
import math
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from apt_ray.errors import DataError, FleetError
from apt_ray.files import read_file
from serving.logs import audit
from serving.settings import CategoryName

_MARK = "apt_ray"
_SEARCH, _ESTIMATE = "search", "estimate"
_STATES: Mapping[str, "SearchState"] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "done",
    "FAILED": "failed",
}
_LOG_LINES = 60
# A search that is stopped registers the best so far, for which Ray's own 3 s are short.
_STOP_WAIT_S = 10

_Model = TypeVar("_Model", bound=BaseModel)

SearchState = Literal["pending", "running", "stopped", "done", "failed"]


class SearchRequest(BaseModel):
    """What is to be searched."""

    model_config = ConfigDict(extra="forbid")

    category: CategoryName
    data: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="A folder on the cluster or s3://, of categories or with this category's"
        " normal images; null takes those that were sent to the fleet.",
    )
    shots: int = Field(default=4, ge=1, le=1024)
    trials: int = Field(default=8, ge=1, le=100_000)
    warm_start: int = Field(default=0, ge=0, description="Trials that begin where champions are.")
    promote: Literal["auto", "never"] = Field(
        default="never", description="Whether the winner may become the champion by itself."
    )
    dry_run: bool = Field(
        default=False, description="Only say what it will take: `estimate`, once that is done."
    )


class SearchProgress(BaseModel):
    """How far a search is."""

    trials: int = Field(description="Trials in all.")
    ended: int
    live: int
    best: float | None = Field(description="Best validation value so far, AUROC in 0..1.")
    best_sd: float | None
    left_s: float | None = Field(description="Seconds that are left, as far as can be told.")


class SearchEstimate(BaseModel):
    """What a search will take, from parts that were timed on the cluster."""

    least_s: float = Field(description="Seconds by the clock, if the worse trials stop early.")
    most_s: float = Field(description="Seconds by the clock, if none do.")
    cpu_s: float = Field(description="Seconds of one CPU in all, if none do.")
    gpu_s: float = Field(description="Likewise of one GPU; 0 on a cluster without any.")
    cpus: int = Field(description="CPUs of the cluster.")
    gpus: int
    encoded_mib: float = Field(description="MiB that are kept of the encoded images.")


class SearchReport(BaseModel):
    """A search, or an estimate of one."""

    id: str
    category: str
    state: SearchState
    dry_run: bool
    data: str | None = Field(default=None, description="Null for the images that were sent.")
    shots: int | None = Field(default=None, description="As asked for; null if not known.")
    trials: int | None = None
    by: str = Field(description="Name of the token that started it.")
    started_at: float | None = Field(description="Seconds since the epoch.")
    ended_at: float | None
    progress: SearchProgress | None = None
    estimate: SearchEstimate | None = Field(default=None, description="Of a dry run that is done.")
    link: str | None = Field(
        default=None,
        description="Its page in Ray's dashboard, if the fleet file has searches.dashboard.",
    )
    problem: str | None = Field(default=None, description="Why it failed.")
    log: str = Field(default="", description="The end of its log; in the answer for one search.")


class SearchList(BaseModel):
    searches: list[SearchReport] = Field(description="Newest first.")


class Job(Protocol):
    """What is read of a Ray job."""

    submission_id: str | None
    status: Any
    metadata: dict[str, str] | None
    message: str | None
    start_time: int | None
    end_time: int | None


class Jobs(Protocol):
    """Ray's jobs, as `ray.job_submission.JobSubmissionClient` has them."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> str: ...
    def list_jobs(self) -> list[Any]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def get_job_logs(self, job_id: str) -> str: ...


class SearchRunsError(Exception):
    """A search of this category runs already."""


class UnknownSearchError(Exception):
    """There is no such search."""


class Searches:
    """The searches of a fleet; every method waits for Ray's dashboard.

    Args:
        jobs: gives Ray's jobs; FleetError if they cannot be reached.
        folder: where images, progress and the state of searches lie.
        tracking_uri: of the registry.
        dashboard: Ray's address for people, if it has one.
    """

    def __init__(
        self,
        jobs: Callable[[], Jobs],
        folder: Path,
        *,
        tracking_uri: str,
        dashboard: str | None = None,
    ) -> None:
        self._jobs, self._folder, self._tracking_uri = jobs, folder, tracking_uri
        self._dashboard = dashboard
        self._problems: dict[str, str | None] = {}

    def start(self, request: SearchRequest, *, by: str, images: Path) -> SearchReport:
        """Start a search, of the images in a folder of categories if the request names none.

        Raises:
            SearchRunsError: one of the same category runs.
            FleetError: Ray does not take it.
        """
        for job in self._all():
            if job.metadata["category"] == request.category and not job.end_time:
                raise SearchRunsError(f"{job.submission_id} searches {request.category} already")
        name = f"search-{request.category}-{secrets.token_hex(4)}"
        jobs = self._jobs()
        try:
            jobs.submit_job(
                entrypoint=shlex.join(self._command(request, name, images)),
                submission_id=name,
                runtime_env={
                    "env_vars": {
                        "MLFLOW_TRACKING_URI": self._tracking_uri,
                        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
                    }
                },
                metadata={
                    _MARK: _ESTIMATE if request.dry_run else _SEARCH,
                    "category": request.category,
                    "by": by,
                    "shots": str(request.shots),
                    "trials": str(request.trials),
                    **({"data": request.data} if request.data else {}),
                },
            )
        except RuntimeError as error:
            raise FleetError(f"Ray does not take the search: {error}") from error
        audit("search", id=name, by=by, **request.model_dump(exclude_defaults=True))
        return self.find(name)

    def newest_first(self, category: str | None = None) -> list[SearchReport]:
        """All that Ray knows of, of one category or of all, newest first; with the reason of those
        that failed, but no logs."""
        found = [
            job
            for job in self._all()
            if job.submission_id and category in (None, job.metadata["category"])
        ]
        # One that has just been submitted has no start yet.
        found.sort(key=lambda job: job.start_time or math.inf, reverse=True)
        return [self._report(job) for job in found]

    def find(self, search: str) -> SearchReport:
        """One of them, with the end of its log; UnknownSearchError if there is none."""
        job = next((job for job in self._all() if job.submission_id == search), None)
        if job is None:
            raise UnknownSearchError(search)
        report = self._report(job)
        report.log = "\n".join(self._log(search)[-_LOG_LINES:])
        return report

    def stop(self, search: str, *, by: str) -> SearchReport:
        """Have one end; the best so far becomes the candidate."""
        report = self.find(search)
        if report.ended_at is not None:
            return report
        self._jobs().stop_job(search)
        audit("search stopped", id=search, by=by)
        return self.find(search)

    def _all(self) -> list[Any]:
        try:
            jobs = self._jobs().list_jobs()
        except RuntimeError as error:
            raise FleetError(f"Ray does not tell its jobs: {error}") from error
        return [job for job in jobs if (job.metadata or {}).get(_MARK) in (_SEARCH, _ESTIMATE)]

    def _command(self, request: SearchRequest, name: str, images: Path) -> list[str]:
        state = self._folder / "state"
        common = [
            *(sys.executable, "-m", "tuning.search"),
            *("--data", request.data or str(images), "--categories", request.category),
            *("--shots", str(request.shots), "--trials", str(request.trials)),
        ]
        common += ["--progress", str(self._progress_file(name))]
        if request.dry_run:
            return [*common, "--dry-run"]
        return [
            *common,
            *("--warm-start", str(request.warm_start), "--promote", request.promote),
            *("--storage", str(state)),
        ]

    def _report(self, job: Job) -> SearchReport:
        metadata = job.metadata or {}
        name = job.submission_id or ""
        category = metadata.get("category", "")
        state = _STATES[str(getattr(job.status, "value", job.status))]
        written = self._written(name)
        return SearchReport(
            id=name,
            category=category,
            state=state,
            dry_run=metadata[_MARK] == _ESTIMATE,
            data=metadata.get("data"),
            shots=_whole(metadata.get("shots")),
            trials=_whole(metadata.get("trials")),
            by=metadata.get("by", ""),
            started_at=_seconds(job.start_time),
            ended_at=_seconds(job.end_time),
            progress=_read(SearchProgress, written, "categories", category),
            estimate=_read(SearchEstimate, written, "estimate"),
            link=f"{self._dashboard.rstrip('/')}/#/jobs/{name}" if self._dashboard else None,
            problem=self._problem(job, category) if state == "failed" else None,
        )

    def _problem(self, job: Job, category: str) -> str | None:
        """Why a search failed: what its log says last, or Ray's own words."""
        name = job.submission_id or ""
        if name not in self._problems:
            self._problems[name] = _why(self._log(name), category) or job.message
        return self._problems[name]

    def _log(self, name: str) -> list[str]:
        try:
            return self._jobs().get_job_logs(name).splitlines()
        except RuntimeError:
            return []  # it lay on a node that is gone

    def _written(self, name: str) -> Any:
        """What a search or an estimate has written of itself."""
        try:
            return json.loads(read_file(self._progress_file(name)))
        except (DataError, ValueError):
            return None  # nothing has ended yet, or it lies on another node

    def _progress_file(self, name: str) -> Path:
        return self._folder / "progress" / f"{name}.json"


def _read(model: type[_Model], content: Any, *path: str) -> _Model | None:
    """What stands at a path of a file that was read; None if nothing, or nothing of that kind."""
    try:
        for key in path:
            content = content[key]
        return model.model_validate(content)
    except (ValueError, KeyError, TypeError):
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _why(lines: Sequence[str], category: str) -> str | None:
    """What the log of a search says of its failure, last."""
    for line in reversed(lines):
        for begin in ("error: ", f"not registered: {category}: "):
            _, found, reason = line.partition(begin)
            if found:
                return reason
    return None


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1000
