"""The door to where pictures lie: local folders, or S3 under `s3://bucket/prefix`.

Credentials, region and endpoint of S3 come from where boto3 looks for them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_PROFILE, a role of the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any

from apt_ray.errors import DataError
from apt_ray.optional import require

_SCHEME = "s3:"
_ATTEMPTS = 4
_FIRST_PAUSE = 0.2

_REFUSED = frozenset(
    {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
)
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})


def location(text: str) -> Path:
    """What a user wrote, as a path: `s3://bucket/prefix`, or a local one."""
    return S3Path(text) if text.startswith(f"{_SCHEME}//") else Path(text)


def absolute(path: Path) -> Path:
    """The path in a form that means the same in other processes."""
    return path if isinstance(path, S3Path) else Path(os.path.abspath(path.expanduser()))


class S3Path(PosixPath):
    """An object or a prefix in S3, read as a file or folder is; it can be sent to other machines.

    Only what reads is there: `is_dir`, `is_file`, `iterdir`, `read_bytes`. Each raises DataError,
    with the remedy, if S3 cannot be reached or refuses. Keys with empty parts (`a//b`) cannot be
    named.
    """

    # Set on what a listing returns, so that its kind need not be asked for again.
    _known_file: bool | None = None

    def __str__(self) -> str:
        is_whole = self.parts[:1] == (_SCHEME,)
        return f"{_SCHEME}//{'/'.join(self.parts[1:])}" if is_whole else "/".join(self.parts)

    def is_dir(self, **_: Any) -> bool:
        if self._known_file is not None:
            return not self._known_file
        listed = self._ask("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        return bool(listed.get("KeyCount"))

    def is_file(self, **_: Any) -> bool:
        if self._known_file is not None:
            return self._known_file
        listed = self._ask("list_objects_v2", Prefix=self._key, MaxKeys=1)
        return any(entry["Key"] == self._key for entry in listed.get("Contents", ()))

    def iterdir(self) -> Iterator[S3Path]:  # type: ignore[override]
        request = {"Prefix": self._prefix, "Delimiter": "/"}
        while True:
            page = self._ask("list_objects_v2", **request)
            for entry in page.get("CommonPrefixes", ()):
                yield self._child(entry["Prefix"], is_file=False)
            for entry in page.get("Contents", ()):
                # A folder made in S3's console is an empty object of the prefix's own name.
                if entry["Key"] != self._prefix:
                    yield self._child(entry["Key"], is_file=True)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read_bytes(self) -> bytes:
        """The whole object; a transfer that breaks off is begun again, up to three times."""
        require("boto3", extra="s3")
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        for attempt in range(_ATTEMPTS):
            answer = self._ask("get_object", Key=self._key)
            try:
                # The bytes are counted: what arrives short raises.
                with answer["Body"] as body:
                    data: bytes = body.read()
                return data
            except (BotoCoreError, HTTPError, OSError) as error:
                broken: Exception = error
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise DataError(
            f"reading {self} broke off {_ATTEMPTS} times ({broken}): check the network, then retry"
        ) from broken

    def _child(self, key: str, *, is_file: bool) -> S3Path:
        child = self / key[len(self._prefix) :].rstrip("/")
        child._known_file = is_file
        return child

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        require("boto3", extra="s3")
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if self.parts[:1] != (_SCHEME,) or len(self.parts) < 2:
            raise DataError(f"{self} names no bucket: give s3://bucket/prefix")
        bucket = self.parts[1]
        try:
            answer: dict[str, Any] = getattr(s3_client(), operation)(Bucket=bucket, **parameters)
            return answer
        except NoCredentialsError as error:
            raise DataError(
                f"no credentials to read {self}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
                f" or AWS_PROFILE"
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
        except BotoCoreError as error:
            raise DataError(
                f"cannot read {self} ({error}): check the network, AWS_DEFAULT_REGION and"
                f" AWS_ENDPOINT_URL_S3"
            ) from error


@lru_cache(maxsize=1)
def s3_client() -> Any:
    """The client of this process; it repeats requests that fail in transit."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
    session = boto3.session.Session()
    return session.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))
