"""The local cache: what a replica last knew, for the time in which nobody answers.

Files are written whole or not at all, so that replicas of one machine may share a folder. A version
never changes, so its file is never out of date. Nothing is unpickled.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from apt_ray.config import Settings
from apt_ray.errors import WriteError
from apt_ray.files import write_whole
from apt_ray.machine import expanded
from serving.controller.orders import StoredVersion

_KEPT = 3

AnySettings = TypeVar("AnySettings", bound=Settings)


class Cache:
    """A folder of prompt sets and of the last orders.

    Args:
        folder: Where; `~` is the user's home.
        registry: Address of the registry that the versions are of: two never mix.

    Writing fails silently (a full disk must not stop the fleet); what cannot be read is absent, and
    so is a version whose file is damaged: its name holds the digest of what was written.
    """

    def __init__(self, folder: str, registry: str) -> None:
        key = hashlib.sha256(registry.encode()).hexdigest()[:16]
        self._folder = expanded(Path(folder)) / key

    def put(self, stored: StoredVersion) -> None:
        """Keep a version, and the last few of its category besides; once is enough."""
        name = f"{stored.version}-{stored.run_id or 'unknown'}-{_digest(stored.data)}.safetensors"
        path = self._folder / stored.category / name
        with contextlib.suppress(OSError, WriteError):
            if path.exists():
                return
            write_whole(path, stored.data, private=True)
            files = sorted(self._folder.glob(f"{stored.category}/*.safetensors"), key=_modified)
            for file in files[:-_KEPT]:
                file.unlink(missing_ok=True)

    def get(self, category: str, version: int) -> StoredVersion | None:
        with contextlib.suppress(OSError):
            for file in self._folder.glob(f"{category}/{version}-*.safetensors"):
                run_id, _, digest = file.stem.partition("-")[2].rpartition("-")
                data = file.read_bytes()
                if _digest(data) == digest:
                    return StoredVersion(
                        category=category, version=version, run_id=run_id, data=data
                    )
                file.unlink(missing_ok=True)  # or it would stand in the way of a whole one
        return None

    def forget(self, category: str, version: int) -> None:
        """Remove a version's file, which proved to be damaged."""
        with contextlib.suppress(OSError):
            for file in self._folder.glob(f"{category}/{version}-*.safetensors"):
                file.unlink(missing_ok=True)

    def remember(self, name: str, settings: Settings) -> None:
        """Keep settings under a name, for `recall`."""
        with contextlib.suppress(WriteError):
            write_whole(self._folder / f"{name}.json", settings.model_dump_json(), private=True)

    def recall(self, name: str, kind: type[AnySettings]) -> AnySettings | None:
        """The settings last kept under a name."""
        try:
            return kind.model_validate(json.loads((self._folder / f"{name}.json").read_bytes()))
        except (OSError, ValueError, ValidationError):
            return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _modified(path: Path) -> float:
    return path.stat().st_mtime
