"""A registry in one file, and back: for the day on which its server is lost.

The file is a tar archive of `<category>/<version>/...`, every file of every version, with
`manifest.json` at its end: what else is known of them, aliases, histories and thresholds, and the
SHA-256 of each file. What lacks its end, or has changed, is refused. It needs no access to the
registry's database or store, and fits any kind of them.
"""

import io
import json
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from apt_ray.config import CATEGORY_NAME, OperatorThreshold, Settings
from apt_ray.errors import RegistryError, WriteError
from apt_ray.files import StrPath, writing
from apt_ray.registry.contents import DIRECTORY, Record, sha256
from apt_ray.registry.history import Move
from apt_ray.registry.protocol import CHAMPION, ExportedVersion, RegisteredVersion, Registry
from apt_ray.version import __version__

Progress = Callable[[int, int], None]

_MANIFEST = "manifest.json"
_FORMAT = 1
_RESTORED_AS = "restored_as"
"""Tag of a version that an import made: the number that it had, and is to have again."""
_NONE = "none"


class _Version(Settings):
    """A version in the manifest; `files` are path -> SHA-256."""

    record: dict[str, Any]
    run_id: str
    page: str
    created: str
    files: dict[str, str]


class _Category(Settings):
    aliases: dict[str, int]
    moves: tuple[dict[str, Any], ...]
    threshold: OperatorThreshold | None = None
    versions: dict[int, _Version] = Field(min_length=1)


class _Manifest(Settings):
    format: int
    written: str
    written_by: str
    source: str
    categories: dict[str, _Category]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """What a file of `export_registry` holds.

    Attributes:
        written: when, ISO 8601 in UTC.
        source: address of the registry that it is of.
        versions: category -> its versions, oldest first.
    """

    written: str
    source: str
    versions: Mapping[str, Sequence[int]]


def export_registry(
    registry: Registry,
    path: StrPath,
    categories: Sequence[str] = (),
    *,
    progress: Progress = lambda done, total: None,
) -> Backup:
    """Write all that a registry knows of its categories to one file.

    The file is there once it is whole. Nobody is kept from using the registry meanwhile; what is
    registered while it runs may be missing.

    Args:
        categories: whose versions; none means all.
        progress: called with how many versions are written, of how many.

    Raises:
        RegistryError: A category does not exist, or its versions changed while they were read.
        WriteError: The file cannot be written.
    """
    known = registry.categories()
    for category in categories:
        registry.history(category)  # or it is not there
    chosen = {name: known[name] for name in sorted(categories or known)}
    numbers = {name: sorted(registry.versions(name)) for name in chosen}
    total, done = sum(map(len, numbers.values())), 0
    told: dict[str, _Category] = {}
    with writing(path, private=True) as place, _archive(place) as archive:
        for name, now in chosen.items():
            history = registry.history(name)
            versions: dict[int, _Version] = {}
            for number in numbers[name]:
                versions[number] = _add(archive, registry, registry.resolve(name, str(number)))
                done += 1
                progress(done, total)
            if gone := set(now.aliases.values()) - set(versions):
                raise RegistryError(
                    f"{name} has changed while it was read (version {max(gone)}): export again"
                )
            if versions:
                told[name] = _Category(
                    aliases=dict(now.aliases),
                    moves=tuple(asdict(move) for move in history.moves if move.number),
                    threshold=now.threshold,
                    versions=versions,
                )
        manifest = _Manifest(
            format=_FORMAT,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            written_by=f"apt-ray {__version__}",
            source=registry.address,
            categories=told,
        )
        _add_bytes(archive, _MANIFEST, manifest.model_dump_json(indent=1).encode())
    return _described(manifest)


@contextmanager
def _archive(place: Path) -> Iterator[tarfile.TarFile]:
    """For writing, and for its owner alone; one that was not written to its end has none."""
    opener = partial(os.open, mode=0o600)
    with (
        open(place, "wb", opener=opener) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        yield archive


def import_registry(
    registry: Registry,
    path: StrPath,
    *,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Backup:
    """Bring a registry to what a file of `export_registry` holds: the same versions under the same
    numbers, file by file the same bytes, with their aliases, histories and thresholds.

    The file is read through first, and the registry compared with it: where a category has other
    versions or moves than the file, nothing is changed. What is there already stays, so an import
    that was cut off is begun again. Only times of registration are new.

    Args:
        dry_run: read and compare alone.
        progress: called with how many versions are there, of how many.

    Raises:
        RegistryError: The file is not whole or not of this kind, or the registry has something
            else.
    """
    path = Path(path)
    manifest = _read(path)
    there, leftovers = _compare(registry, manifest)
    if dry_run:
        return _described(manifest)
    for name, number in leftovers:
        registry.delete(name, number)
    total, done = sum(len(one.versions) for one in manifest.categories.values()), 0
    with _opened(path) as archive:
        for name, category in manifest.categories.items():
            for number, version in sorted(category.versions.items()):
                if number not in there[name]:
                    _restore(registry, archive, name, number, version)
                done += 1
                progress(done, total)
            registry.restore_category(
                name,
                aliases=category.aliases,
                moves=[Move(**move) for move in category.moves],
                threshold=category.threshold,
            )
    return _described(manifest)


def _described(manifest: _Manifest) -> Backup:
    return Backup(
        written=manifest.written,
        source=manifest.source,
        versions={name: sorted(one.versions) for name, one in manifest.categories.items()},
    )


def _add(archive: tarfile.TarFile, registry: Registry, registered: RegisteredVersion) -> _Version:
    with tempfile.TemporaryDirectory(prefix="apt-ray-") as folder:
        home = Path(folder)
        exported = registry.export(registered, home)
        digests = {}
        for file in sorted(home.rglob("*")):
            if file.is_file():
                name = file.relative_to(home).as_posix()
                data = file.read_bytes()
                digests[name] = sha256(data)
                _add_bytes(archive, _member(registered.category, registered.version, name), data)
    tags = {key: tag for key, tag in exported.record.tags.items() if key != _RESTORED_AS}
    return _Version(
        record=asdict(replace(exported.record, tags=tags)),
        run_id=exported.run_id,
        page=exported.page,
        created=exported.created,
        files=digests,
    )


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _member(category: str, version: int, name: str) -> str:
    return f"{category}/{version}/{name}"


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (OSError, tarfile.TarError, EOFError) as error:
        raise RegistryError(
            f"{path} is no whole backup of a registry ({error}): take another copy of it, or"
            " another backup"
        ) from error


def _read(path: Path) -> _Manifest:
    """The manifest of a file of which every byte is as it was written."""
    found: dict[str, str] = {}
    with _opened(path) as archive:
        last = b""
        for member in archive:
            if not member.isfile() or member.name in found:
                raise RegistryError(
                    f"{path} holds what no backup does ({member.name}): use another"
                )
            last = _content(archive, member)
            found[member.name] = sha256(last)
    try:
        if _MANIFEST not in found or found[_MANIFEST] != sha256(last):
            raise ValueError(f"it ends without its {_MANIFEST}")
        told = json.loads(last)
        if isinstance(told, dict) and told.get("format", 0) > _FORMAT:
            raise RegistryError(
                f"{path} was written by a later apt-ray ({told.get('written_by')}): update this one"
            )
        manifest = _Manifest.model_validate(told)
        _check_names(manifest)
        expected = {
            _member(name, number, file): digest
            for name, category in manifest.categories.items()
            for number, version in category.versions.items()
            for file, digest in version.files.items()
        }
        del found[_MANIFEST]
        if expected != found:
            changed = min(name for name, _ in expected.items() ^ found.items())
            raise ValueError(f"{changed} has been changed, or is missing")
    except (ValueError, TypeError, ValidationError) as error:
        raise RegistryError(
            f"{path} is no whole backup of a registry ({error}): take another copy of it, or"
            " another backup"
        ) from error
    return manifest


def _check_names(manifest: _Manifest) -> None:
    """ValueError for what could be written outside of a folder, or is no version."""
    for name, category in manifest.categories.items():
        if not re.fullmatch(CATEGORY_NAME, name):
            raise ValueError(f"{name!r} cannot name a category")
        for move in category.moves:
            Move(**move)
        if others := set(category.aliases.values()) - set(category.versions):
            raise ValueError(f"{name} has an alias of version {max(others)}, which is missing")
        for version in category.versions.values():
            _record(version)
            for file in version.files:
                parts = PurePosixPath(file).parts
                if file.startswith("/") or ".." in parts or not parts:
                    raise ValueError(f"{file!r} cannot name a file of a version")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"it breaks off in {member.name}")
    return data


def _record(version: _Version, **tags: str) -> Record:
    fields = {**version.record, "pictures": tuple(version.record["pictures"])}
    return Record(**{**fields, "may_serve": False, "tags": {**fields["tags"], **tags}})


def _compare(
    registry: Registry, manifest: _Manifest
) -> tuple[dict[str, set[int]], list[tuple[str, int]]]:
    """The versions that are there already, and those that an import that was cut off has left under
    another number; RegistryError if a category has what the backup does not have."""
    known = registry.aliases()
    there: dict[str, set[int]] = {name: set() for name in manifest.categories}
    leftovers: list[tuple[str, int]] = []
    for name, category in manifest.categories.items():
        if name not in known:
            continue
        for number in registry.versions(name):
            registered = registry.resolve(name, str(number))
            meant = registered.tags.get(_RESTORED_AS, str(number))
            backed_up = category.versions.get(number)
            if meant != str(number):
                leftovers.append((name, number))
            elif backed_up is None or registered.tags.get("sha256") != (
                backed_up.record["version_tags"] | backed_up.record["tags"]
            ).get("sha256"):
                raise _other(registry, name, f"its version {number} is another or none in the file")
            else:
                there[name].add(number)
        champion = known[name].get(CHAMPION)
        made = [asdict(move) for move in registry.history(name).moves if move.number]
        if made != list(category.moves)[: len(made)] or champion not in (
            None,
            category.aliases.get(CHAMPION),
        ):
            raise _other(registry, name, "its champion was moved since the file was written")
    return there, leftovers


def _other(registry: Registry, category: str, reason: str) -> RegistryError:
    return RegistryError(
        f"{category} in the registry at {registry.address} is not what the file holds ({reason});"
        " nothing was changed: import into an empty registry, or delete its registered model first"
    )


def _restore(
    registry: Registry, archive: tarfile.TarFile, category: str, number: int, version: _Version
) -> None:
    """Make a version have its number again: registries count on, whatever was deleted."""
    exported = ExportedVersion(
        record=_record(version, **{_RESTORED_AS: str(number)}),
        run_id=version.run_id,
        page=version.page,
        created=version.created,
    )
    with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
        folder = Path(name)
        for file in version.files:
            target = folder / file
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                member = archive.getmember(_member(category, number, file))
                target.write_bytes(_content(archive, member))
            except (OSError, ValueError) as error:
                raise WriteError(
                    f"cannot write {target} ({error}): make room, or set TMPDIR"
                ) from None
        restored = registry.restore(folder, exported)
        while restored.version < number:
            registry.delete(category, restored.version)
            for _ in range(number - restored.version - 1):
                _skip(registry, category)
            restored = registry.restore(folder, exported)
    if restored.version > number:
        registry.delete(category, restored.version)
        raise RegistryError(
            f"the registry at {registry.address} has given the number {number} of {category} to"
            " another version before: import into an empty one"
        )


def _skip(registry: Registry, category: str) -> None:
    """Use up the number of a version that was deleted before the backup."""
    record = Record(
        submission=uuid.uuid4().hex,
        category=category,
        pictures=(),
        metrics={},
        params={},
        tags={_RESTORED_AS: _NONE},
        version_tags={},
        may_serve=False,
    )
    with tempfile.TemporaryDirectory(prefix="apt-ray-") as name:
        (Path(name) / DIRECTORY).mkdir()
        (Path(name) / DIRECTORY / "deleted").touch()
        skipped = ExportedVersion(record=record, run_id=_NONE, page="", created="")
        registry.delete(category, registry.restore(Path(name), skipped).version)
