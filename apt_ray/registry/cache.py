"""Downloaded prompt sets on disk, so that a replica can start while the registry is away."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from apt_ray.registry.names import RegisteredVersion

_KEPT = 3


def default_cache() -> Path:
    """Where a machine keeps downloaded versions: APT_RAY_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("APT_RAY_CACHE") or Path(home) / "apt-ray")


class VersionCache:
    """Prompt sets of one registry, by category and version; the newest three of each are kept.

    Files are written whole or not at all, and what they hold is checked by whoever reads them, so
    any number of processes may share a folder.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder / sha256(address.encode()).hexdigest()[:16]

    def get(self, registered: RegisteredVersion) -> bytes | None:
        """The file of a version, None if it is not here."""
        try:
            return self._file(registered).read_bytes()
        except OSError:
            return None

    def last_known(self, category: str, reference: str) -> RegisteredVersion | None:
        """What an alias or a version number meant when the registry last answered."""
        try:
            fields = json.loads(self._note(category, reference).read_text())
            registered = RegisteredVersion(**{**fields, "aliases": tuple(fields["aliases"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return replace(registered, last_known=True)

    def put(self, registered: RegisteredVersion, reference: str, data: bytes) -> None:
        """Keep a version's file and what `reference` means; a full disk only costs the cache."""
        with suppress(OSError):
            if self.get(registered) != data:
                _write(self._file(registered), data)
            note = json.dumps(asdict(registered)).encode()
            path = self._note(registered.category, reference)
            if not path.exists() or path.read_bytes() != note:
                _write(path, note)
            self._drop_old(registered)

    def _file(self, registered: RegisteredVersion) -> Path:
        return self._folder / registered.category / f"{registered.version}.safetensors"

    def _note(self, category: str, reference: str) -> Path:
        return self._folder / category / f"{reference}.json"

    def _drop_old(self, registered: RegisteredVersion) -> None:
        for pattern in ("*.safetensors", "[0-9]*.json"):
            files = [
                path
                for path in (self._folder / registered.category).glob(pattern)
                if path.stem.isdecimal()
            ]
            files.sort(key=lambda path: int(path.stem))
            for path in files[:-_KEPT]:
                if path.stem not in self._noted(registered.category):
                    path.unlink()

    def _noted(self, category: str) -> set[str]:
        """The versions that an alias meant last: they are kept however old they are."""
        notes = [
            self.last_known(category, path.stem)
            for path in (self._folder / category).glob("*.json")
            if not path.stem.isdecimal()
        ]
        return {str(note.version) for note in notes if note is not None}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
