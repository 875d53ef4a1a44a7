"""The records of a search: everything that must outlive its processes, as files in its storage.

    <storage>/<name>/search.json                    what is searched
    <storage>/<name>/<category>/trials/<n>.json     what a trial has reported so far
    <storage>/<name>/<category>/states/<n>-<r>.safetensors   its lanes after rung r, while it runs
    <storage>/<name>/<category>/prompt_set.safetensors       the winner
    <storage>/<name>/<category>/plots/*.png

A trial's file is the truth about it: Ray Tune may lose or repeat a report, and it may be killed at
any moment. Every file is written whole or not at all. No PyTorch here, trials import it.
"""

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from apt_ray.config import Settings
from apt_ray.errors import SettingsError, WriteError
from apt_ray.files import write_whole
from apt_ray.machine import expanded
from tuning.calls import RungResult
from tuning.settings import SearchSettings

Status = Literal["running", "finished", "stopped early", "failed"]

_SEARCH = "search.json"
_PROBE = "writable"
_ROOM_MIB = 256
_READS = 20


class SearchPlan(Settings):
    """What is searched, for those who resume it.

    Attributes:
        data: Folder or address of the images.
        categories: Their names.
        settings: Of the search.
        past: Category -> settings that have won past searches, its first trials after the defaults.
    """

    data: str
    categories: tuple[str, ...]
    settings: SearchSettings
    past: dict[str, tuple[dict[str, Any], ...]] = {}  # noqa: RUF012 - pydantic copies it


class TrialRecord(Settings):
    """One trial: its searched settings and what it reported, rung by rung.

    Attributes:
        category: Whose trial it is.
        number: Place in the order of drawing, from 0.
        settings: Searched setting -> value.
        steps: Optimisation steps done at each rung.
        validation: Validation value (AUROC, 0..1) at each rung.
        validation_sd: Its standard deviation over the judged images.
        patch: AUROC of ranking patches by the map, at each rung.
        seconds: Seconds since the search began, of each report.
        families: Validation value of each perturbation family at the last rung.
        images: Validation value of each judged image at the last rung.
        status: What has become of it.
        error: Why it failed, if it did.
    """

    category: str
    number: int
    settings: dict[str, Any]
    steps: tuple[int, ...] = ()
    validation: tuple[float, ...] = ()
    validation_sd: tuple[float, ...] = ()
    patch: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    families: dict[str, float] = {}  # noqa: RUF012 - pydantic copies it
    images: tuple[float, ...] = ()
    status: Status = "running"
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.status != "running"

    def reported(self, result: RungResult, seconds: float, *, is_last: bool) -> "TrialRecord":
        """The record with one rung more, or with the error that ended it."""
        if result.error is not None:
            return self.model_copy(update={"status": "failed", "error": result.error})
        return self.model_copy(
            update={
                "steps": (*self.steps, result.steps),
                "validation": (*self.validation, result.validation),
                "validation_sd": (*self.validation_sd, result.validation_sd),
                "patch": (*self.patch, result.patch),
                "seconds": (*self.seconds, round(seconds, 2)),
                "families": dict(result.families),
                "images": result.images,
                "status": "finished" if is_last else "running",
            }
        )

    def report(self, rung: int) -> dict[str, Any]:
        """What Ray Tune is told of a rung, from 1."""
        return {
            "rung": rung,
            "steps": self.steps[rung - 1],
            "validation": self.validation[rung - 1],
            "validation_sd": self.validation_sd[rung - 1],
            "patch": self.patch[rung - 1],
        }

    def metrics(self) -> dict[str, float]:
        """Its last validation value, by the names under which a prompt set keeps it."""
        return {
            "validation": self.validation[-1],
            "validation_sd": self.validation_sd[-1],
            **{f"validation.{family}": value for family, value in self.families.items()},
        }

    def row(self) -> dict[str, object]:
        """A row of the trial table."""
        return {
            "trial": self.number,
            **self.settings,
            "validation": self.validation[-1] if self.validation else None,
            "validation_sd": self.validation_sd[-1] if self.validation_sd else None,
            "steps": self.steps[-1] if self.steps else 0,
            "status": self.status,
        }


class SearchStore:
    """The files of one search, in a local folder (on a cluster one that all nodes share) or S3.

    Args:
        storage: Folder or URI, the latter with options of pyarrow in its query.
        name: The search.
    """

    def __init__(self, storage: str, name: str) -> None:
        if "://" not in storage:
            storage = str(expanded(Path(storage)).absolute())
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise SettingsError(
                f"{name!r} cannot name a search: use letters, digits, '.', '-', '_'"
            )
        self.storage, self.name = storage, name

    @property
    def uri(self) -> str:
        """The address of the search's folder."""
        if "://" not in self.storage:
            return f"{self.storage.rstrip('/')}/{self.name}"  # where any character is just one
        base, separator, query = self.storage.partition("?")
        return f"{base.rstrip('/')}/{self.name}{separator}{query}"

    def create(self, plan: SearchPlan) -> None:
        """Write what is searched; SettingsError if nothing can be written there."""
        self.check_writable()
        self.write(_SEARCH, plan.model_dump_json(indent=2).encode())

    def check_writable(self) -> None:
        """SettingsError if the storage takes no files or is nearly full."""
        try:
            files, root = self._files
            if isinstance(files, LocalFileSystem):
                Path(root).mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(root).free / 2**20
                if free < _ROOM_MIB:
                    raise OSError(f"{free:.0f} MiB are free, a search needs {_ROOM_MIB}")
            self.write(_PROBE, b"")
            self.remove(_PROBE)
        except (OSError, WriteError) as error:
            raise SettingsError(
                f"cannot write to the storage {self.storage} ({error}): make room, mend its"
                " permissions, or choose another with --storage"
            ) from error

    def plan(self) -> SearchPlan:
        """What is searched; SettingsError if there is no such search, or the storage is away."""
        try:
            content = self.read(_SEARCH)
        except OSError as error:
            raise SettingsError(
                f"cannot read the storage {self.storage} ({error}): check that it can be reached"
                " from here and, for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if content is None:
            raise SettingsError(
                f"there is no search {self.name} in {self.storage}"
                f"{self._others()}: on a cluster the storage must be a folder that all nodes share,"
                " or s3://"
            )
        try:
            return SearchPlan.parse(json.loads(content))
        except SettingsError as error:
            raise SettingsError(
                f"{self.name} was planned by another version of apt-ray, whose trials do not"
                f" compare with new ones: search anew ({error})"
            ) from error

    def trial(self, category: str, number: int) -> TrialRecord | None:
        """The record of a trial that has reported or ended."""
        content = self.read(f"{category}/trials/{number:04d}.json")
        return None if content is None else TrialRecord.model_validate_json(content)

    def trials(self, category: str) -> list[TrialRecord]:
        """The records of a category, in the order of drawing."""
        contents = [self.read(path) for path in self._list(f"{category}/trials")]
        return [TrialRecord.model_validate_json(content) for content in contents if content]

    def save_trial(self, record: TrialRecord, state: bytes | None = None) -> None:
        """Write a trial's record, and the state of its lanes while it runs."""
        rung = len(record.steps)
        if state is not None and not record.has_ended:
            self.write(_state(record, rung), state)
        self.write(
            f"{record.category}/trials/{record.number:04d}.json", record.model_dump_json().encode()
        )
        self.remove(_state(record, rung - 1))
        if record.has_ended:
            self.remove(_state(record, rung))

    def state(self, record: TrialRecord) -> bytes | None:
        """The state of a running trial's lanes after its last rung."""
        return self.read(_state(record, len(record.steps)))

    def read(self, path: str) -> bytes | None:
        """The content of a file, None if there is none; whole, also while others write it anew."""
        files, root = self._files
        place = f"{root}/{path}"
        for _ in range(_READS):
            try:
                with files.open_input_stream(place) as stream:
                    content: bytes = stream.read()
            except FileNotFoundError:
                return None
            if isinstance(files, LocalFileSystem):
                return content
            # In S3 pyarrow asks for the size first, and reads so much of what is there by then.
            if files.get_file_info(place).size == len(content):
                return content
        raise OSError(f"{place} changes all the time")

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        files, root = self._files
        target = f"{root}/{path}"
        if isinstance(files, LocalFileSystem):
            write_whole(Path(target), content)
            return
        with files.open_output_stream(target) as stream:
            stream.write(content)

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        files, root = self._files
        try:
            files.delete_file(f"{root}/{path}")
        except FileNotFoundError:
            return

    def _list(self, folder: str) -> list[str]:
        files, root = self._files
        found = files.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True))
        return sorted(
            f"{folder}/{info.base_name}"
            for info in found
            if info.type == FileType.File and info.base_name.endswith(".json")
        )

    def _others(self) -> str:
        files, root = self._files
        selector = FileSelector(root.rpartition("/")[0], allow_not_found=True)
        names = sorted(
            info.base_name
            for info in files.get_file_info(selector)
            if files.get_file_info(f"{info.path}/{_SEARCH}").type == FileType.File
        )
        return f", only {', '.join(names)}" if names else ""

    @cached_property
    def _files(self) -> tuple[FileSystem, str]:
        files, root = FileSystem.from_uri(self.uri)
        return files, root

    def __reduce__(self) -> tuple[type["SearchStore"], tuple[str, str]]:
        return SearchStore, (self.storage, self.name)


def _state(record: TrialRecord, rung: int) -> str:
    return f"{record.category}/states/{record.number:04d}-{rung}.safetensors"
