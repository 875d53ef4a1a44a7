"""The door to where pictures lie: local folders, or S3 under `s3://bucket/prefix`.

Credentials, region and endpoint of S3 come from where boto3 looks for them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_PROFILE, a role of the machine.

S3 has a class of its own because cloudpathlib asks again for each of 2,000 listed pictures (2,002
requests, not 2), reads one in seven requests and a copy on disk, and leaves errors to the caller.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from apt_ray.errors import DataError
from apt_ray.optional import require

_SCHEME = "s3://"
_ATTEMPTS = 4
_FIRST_PAUSE = 0.2

_REFUSED = frozenset(
    {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
)
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})


def location(text: str) -> Location:
    """What a user wrote, as a path: `s3://bucket/prefix`, or a local one."""
    if not text.startswith(_SCHEME):
        return Path(text)
    bucket, _, key = text.removeprefix(_SCHEME).partition("/")
    return S3Path((bucket, *_parts(key)))


def absolute(path: Location) -> Location:
    """The path in a form that means the same in other processes."""
    return path if isinstance(path, S3Path) else Path(os.path.abspath(path.expanduser()))


def read_file(path: Location) -> bytes:
    """The whole content; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


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
            found = [(entry["Prefix"], False) for entry in page.get("CommonPrefixes", ())]
            found += [(entry["Key"], True) for entry in page.get("Contents", ())]
            for key, is_file in found:
                name = key.removeprefix(self._prefix).removesuffix("/")
                # A folder made in S3's console is an empty object of the prefix's own name.
                if _parts(name):
                    yield S3Path((*self.parts, name), is_file)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read_bytes(self) -> bytes:
        """The whole object; a transfer that breaks off is begun again, up to three times."""
        require("boto3", extra="s3")
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            answer = self._ask("get_object", Key=self._key)
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
        if not bucket:
            raise DataError(f"{self} names no bucket: give s3://bucket/prefix")
        try:
            answer: dict[str, Any] = getattr(s3_client(), operation)(Bucket=bucket, **parameters)
            return answer
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise DataError(
                f"no credentials to read {self} ({error}): set AWS_ACCESS_KEY_ID and"
                f" AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in _REFUSED:
                reason = (
                    f"access is refused ({code}): check AWS_ACCESS_KEY_ID and"
                    f" AWS_SECRET_ACCESS_KEY, and that they may list and read {bucket}"
                )
            elif code in _MISSING:
                reason = f"it is not there ({code}): check bucket and prefix"
            else:
                reason = f"{error}: check the bucket, or retry"
            raise DataError(f"cannot read {self}: {reason}") from error
        except ParamValidationError as error:
            raise DataError(f"{self} cannot name an object: check bucket and prefix") from error
        except (BotoCoreError, ValueError) as error:
            raise DataError(
                f"cannot read {self} ({error}): check the network, AWS_DEFAULT_REGION and"
                f" AWS_ENDPOINT_URL_S3"
            ) from error


Location: TypeAlias = Path | S3Path


@lru_cache(maxsize=1)
def s3_client() -> Any:
    """The client of this process; it repeats requests that fail in transit."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
    session = boto3.session.Session()
    return session.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))


def _parts(key: str) -> tuple[str, ...]:
    """What stands between its slashes."""
    return tuple(part for part in key.split("/") if part not in ("", "."))
