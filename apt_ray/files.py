"""The door to files: images in local folders or in S3, and whatever is written, whole.

Credentials, region and endpoint of S3 come from where boto3 looks for them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_PROFILE, a role of the machine.

S3 has a class of its own because cloudpathlib asks again for each of 2,000 listed images (2,002
requests, not 2), reads one in seven requests and a copy on disk, and leaves errors to the caller.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, cast

from apt_ray.errors import DataError, WriteError
from apt_ray.machine import expanded
from apt_ray.optional import require

_SCHEME = "s3://"
# Hidden files and folders, those of file servers, archives, Windows and disks.
_FOREIGN = re.compile(
    r"\.|@(eaDir|Recycle|Recently-Snapshot|tmp)$|#(recycle|snapshot)$|__MACOSX$"
    r"|\$RECYCLE\.BIN$|System Volume Information$|lost\+found$"
)
_ATTEMPTS = 4
_FIRST_PAUSE = 0.2
_PROBE_BYTES = 2**16

_REFUSED = frozenset(
    {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
)
# What the client repeats, a while, before it gives up.
_BUSY = frozenset({"503", "SlowDown", "Throttling", "RequestLimitExceeded", "ServiceUnavailable"})
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})


def location(path: AnyPath) -> Location:
    """A path as a user gives it: text or any other path-like object; `s3://bucket/prefix`, or a
    local one."""
    if isinstance(path, S3Path):
        return path
    text = os.fspath(path)
    if not text.startswith(_SCHEME):
        return Path(text)
    bucket, _, key = text.removeprefix(_SCHEME).partition("/")
    return S3Path((bucket, *_parts(key)))


def absolute(path: AnyPath) -> Location:
    """The path in a form that means the same in other processes."""
    path = location(path)
    return path if isinstance(path, S3Path) else Path(os.path.abspath(expanded(path)))


def is_within(path: AnyPath, folder: AnyPath) -> bool:
    """Whether a path is that of the folder or lies in it, wherever links lead."""
    path, folder = (
        each if isinstance(each, S3Path) else Path(os.path.realpath(each))
        for each in map(absolute, (path, folder))
    )
    return type(path) is type(folder) and path.parts[: len(folder.parts)] == folder.parts


def visible(folder: AnyPath) -> list[Location]:
    """What is in the folder, sorted, without hidden files and what systems and servers leave there,
    such as a NAS's `@eaDir`; nothing if there is no such folder. DataError if it cannot be listed.
    """
    folder = location(folder)
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not _FOREIGN.match(path.name))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def files_below(folder: AnyPath) -> Iterator[str]:
    """The files in a folder and in its folders, as texts, without what `visible` leaves out.

    A million of them are little more than their names. Links to folders, which may lead back, are
    not followed. DataError if a folder cannot be listed.
    """
    folder = location(folder)
    try:
        if isinstance(folder, S3Path):
            listed = [(path.name, path.is_dir()) for path in folder.iterdir()]
        else:
            with os.scandir(folder) as entries:
                listed = [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in entries
                    if not (entry.is_symlink() and entry.is_dir())
                ]
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    for name, is_folder in sorted(listed):
        if _FOREIGN.match(name):
            continue
        if is_folder:
            yield from files_below(folder / name)
        else:
            yield f"{folder}/{name}"


def read_file(path: AnyPath) -> bytes:
    """The whole content; DataError if it cannot be read."""
    try:
        return location(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_part(path: AnyPath, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on, or to its end; DataError if it cannot be read."""
    path = location(path)
    if isinstance(path, S3Path):
        return path.read_bytes(start, size)
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_file(path: AnyPath, *, ahead: int) -> BinaryIO:
    """A file or an object of S3, to be read here and there; `ahead` bytes are fetched at once.

    DataError, now or while it is read, if it cannot be read.
    """
    path = location(path)
    if isinstance(path, S3Path):
        return cast(BinaryIO, io.BufferedReader(_Parts(path), buffer_size=ahead))
    try:
        return path.open("rb", buffering=ahead)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


class _Parts(io.RawIOBase):
    """An object of S3, of which each read is a request."""

    def __init__(self, path: S3Path) -> None:
        self._path, self._place, self._size = path, 0, path._size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}
        self._place = starts[whence] + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._place)
        if size <= 0:
            return 0
        data = self._path.read_bytes(self._place, size)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextmanager
def writing(path: StrPath, *, private: bool = False) -> Iterator[Path]:
    """A place to write a file or folder to, which becomes `path` once the block ends well.

    Until then, and if it does not, whatever was at `path` stays; what was half written is removed.
    Any number of writers may write the same file: the last to end wins. Folders on the way are
    made. A link stays and leads to the new file; a pipe or device, such as /dev/stdout, is written
    to directly. The disk is not waited for, which takes 40 times as long and would help only
    against a loss of power: whoever reads a file that this spoils finds it damaged.

    Args:
        private: the folder, where it is made here, is for its owner alone.

    Raises:
        WriteError: the block raised OSError, or the file cannot be put in its place.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    unfinished = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        with _refusing(path):
            if path.exists() and not path.is_file() and not path.is_dir():
                yield path
            else:
                target.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
                yield unfinished
                unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()


def check_writable(path: Path | None, *, is_folder: bool = False) -> None:
    """WriteError now, before any work, if a file cannot be written to `path` later.

    What is not there yet is not made. Only a disk that fills up in the meantime, or a device, can
    still refuse.

    Args:
        path: None is no file, and all right.
        is_folder: `path` is a folder that files are written to.
    """
    if path is None:
        return
    with _refusing(path):
        place = Path(os.path.realpath(path))
        if place.exists() and not place.is_file() and not place.is_dir():
            return
        if not is_folder:
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            place = place.parent
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(_PROBE_BYTES))


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write what took long to compute by `write(path)`; if that fails, to a new temporary folder.

    Raises WriteError in either case: it says where the result lies, if it could be kept at all.
    """
    try:
        write(path)
    except WriteError as error:
        try:
            other = Path(tempfile.mkdtemp(prefix="apt-ray-")) / path.name
            write(other)
        except (OSError, WriteError):
            raise error from None
        raise WriteError(f"{error}; until then it is kept in {other}") from error


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """OSError as WriteError, with the remedy."""
    try:
        yield
    except OSError as error:
        is_blocked = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is where a folder should be" if is_blocked else error.strerror or error
        raise WriteError(
            f"cannot write {path} ({reason}): make room, mend its permissions, or choose another"
            f" place"
        ) from error


def write_whole(path: StrPath, content: bytes | str, *, private: bool = False) -> None:
    """Write a file as `writing` does, text in UTF-8, with escapes of what is in no Unicode text; a
    private one only its owner may read."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    opener = partial(os.open, mode=0o600 if private else 0o666)
    with writing(path, private=private) as place, open(place, "wb", opener=opener) as file:
        file.write(data)


def put(path: AnyPath, content: bytes, *, private: bool = False) -> None:
    """Write a file as `write_whole` does, or an object of S3 in one request, which is as whole.

    WriteError if it cannot be written.
    """
    path = location(path)
    if isinstance(path, S3Path):
        path._write(content)
    else:
        write_whole(path, content, private=private)


def sizes(folder: AnyPath) -> dict[str, int]:
    """Name -> bytes of the files that lie in a folder, in the order of the names; none if there is
    no such folder. Hidden files are left out. DataError if it cannot be listed."""
    folder = location(folder)
    try:
        if isinstance(folder, S3Path):
            found = {path.name: path._known_size for path in folder.iterdir() if path.is_file()}
        else:
            found = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # somebody removes it meanwhile
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    return {name: found[name] for name in sorted(found) if not name.startswith(".")}


def remove(path: AnyPath) -> None:
    """Remove a file or an object of S3; nothing happens if it is not there. WriteError if it cannot
    be removed."""
    path = location(path)
    if isinstance(path, S3Path):
        path._remove()
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(
            f"cannot remove {path} ({error.strerror}): mend the permissions of its folder"
        ) from error


def write_json(path: StrPath, value: object) -> None:
    """Write a value as indented JSON, as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def file_sha256(path: AnyPath) -> str:
    """The SHA-256 of a file, in hex; DataError if it cannot be read."""
    return hashlib.sha256(read_file(path)).hexdigest()


@dataclass(frozen=True, order=True, slots=True)
class S3Path:
    """A bucket, or an object or prefix in it; it can be sent to other machines.

    What is there means the same as of a `pathlib.Path`, and what is not there does not work on S3.
    `is_dir`, `is_file`, `iterdir` and `read_bytes` ask S3, and raise DataError, with the remedy, if
    it cannot be reached or refuses. A prefix that no key begins with is no folder, and empty. Keys
    with empty parts (`a//b`) cannot be named.

    Attributes:
        parts: the bucket, and what stands between the slashes of the key.
    """

    parts: tuple[str, ...]
    # Set on what a listing returns, so that its kind need not be asked for again.
    _known_file: bool | None = field(default=None, compare=False, repr=False)
    _known_size: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return _SCHEME + "/".join(self.parts)

    def __truediv__(self, key: str) -> S3Path:
        return S3Path((*self.parts, *_parts(key)))

    def __reduce__(self) -> tuple[type[S3Path], tuple[tuple[str, ...]]]:
        return S3Path, (self.parts,)

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> S3Path:
        return S3Path(self.parts[:-1] or self.parts)

    def is_dir(self) -> bool:
        if self._known_file is not None:
            return not self._known_file
        listed = self._ask("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        return bool(listed.get("KeyCount"))

    def is_file(self) -> bool:
        if self._known_file is not None:
            return self._known_file
        listed = self._ask("list_objects_v2", Prefix=self._key, MaxKeys=1)
        return any(entry["Key"] == self._key for entry in listed.get("Contents", ()))

    def iterdir(self) -> Iterator[S3Path]:
        request = {"Prefix": self._prefix, "Delimiter": "/"}
        while True:
            page = self._ask("list_objects_v2", **request)
            found = [(entry["Prefix"], False, 0) for entry in page.get("CommonPrefixes", ())]
            found += [
                (entry["Key"], True, int(entry["Size"])) for entry in page.get("Contents", ())
            ]
            for key, is_file, size in found:
                name = key.removeprefix(self._prefix).removesuffix("/")
                # A folder made in S3's console is an empty object of the prefix's own name.
                if _parts(name):
                    yield S3Path((*self.parts, name), is_file, size)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _size(self) -> int:
        """Bytes of the object; DataError if there is none."""
        return int(self._ask("head_object", Key=self._key)["ContentLength"])

    def _write(self, content: bytes) -> None:
        """Put the object there in one request; WriteError if S3 cannot be reached or refuses."""
        try:
            self._ask("put_object", Key=self._key, Body=content)
        except DataError as error:
            raise WriteError(str(error)) from error

    def _remove(self) -> None:
        """Remove the object, if it is there; WriteError if S3 cannot be reached or refuses."""
        try:
            self._ask("delete_object", Key=self._key)
        except DataError as error:
            raise WriteError(str(error)) from error

    def read_bytes(self, start: int = 0, size: int | None = None) -> bytes:
        """The object, or a part of it; a transfer that breaks off is begun again, up to three
        times."""
        require("boto3", extra="s3")
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        part = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            answer = self._ask("get_object", Key=self._key, **part)
            try:
                # The bytes are counted: what arrives short raises.
                with answer["Body"] as body:
                    data: bytes = body.read()
                return data
            except (BotoCoreError, HTTPError, OSError) as error:
                broken: Exception = error
        raise DataError(
            f"reading {self} broke off {_ATTEMPTS} times ({broken}): check the network, then retry"
        ) from broken

    @property
    def _key(self) -> str:
        return "/".join(self.parts[1:])

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        require("boto3", extra="s3")
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        bucket = self.parts[0]
        verb = {"put_object": "write", "delete_object": "remove"}.get(operation, "read")
        if not bucket:
            raise DataError(f"{self} names no bucket: give s3://bucket/prefix")
        try:
            answer: dict[str, Any] = getattr(s3_client(), operation)(Bucket=bucket, **parameters)
            return answer
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise DataError(
                f"no credentials to {verb} {self} ({error}): set AWS_ACCESS_KEY_ID and"
                f" AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in _REFUSED:
                reason = (
                    f"access is refused ({code}): check AWS_ACCESS_KEY_ID and"
                    f" AWS_SECRET_ACCESS_KEY, and that they may list and {verb} {bucket}"
                )
            elif code in _MISSING:
                reason = f"it is not there ({code}): check bucket and prefix"
            elif code in _BUSY:
                reason = f"S3 has too much to do ({code}): wait, then retry"
            else:
                reason = f"{error}: check the bucket, or retry"
            raise DataError(f"cannot {verb} {self}: {reason}") from error
        except ParamValidationError as error:
            raise DataError(f"{self} cannot name an object: check bucket and prefix") from error
        except (BotoCoreError, ValueError) as error:
            raise DataError(
                f"cannot {verb} {self} ({error}): check the network, AWS_DEFAULT_REGION and"
                f" AWS_ENDPOINT_URL_S3"
            ) from error


Location: TypeAlias = Path | S3Path
"""Where something lies, as the functions here hand it on."""
StrPath: TypeAlias = str | os.PathLike[str]
"""A local path as users may give it."""
AnyPath: TypeAlias = StrPath | S3Path
"""Any path as users may give it; `location` reads it."""


@lru_cache(maxsize=1)
def s3_client() -> Any:
    """The client of this process; it repeats requests that fail in transit."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    session = boto3.session.Session()
    return session.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))


def _parts(key: str) -> tuple[str, ...]:
    """What stands between its slashes."""
    return tuple(part for part in key.split("/") if part not in ("", "."))
