"""Versions that wait on disk because the registry was away."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from apt_ray.files import writing
from apt_ray.machine import pending_folder


def default_pending() -> Path:
    """Where a machine keeps what could not be registered: APT_RAY_PENDING, or the user's state."""
    return pending_folder()


def keep(version_folder: Path, name: str, pending: Path) -> Path:
    """Copy a written version to where it waits, whole or not at all; once it waits, it stays."""
    kept = pending / name
    if not kept.exists():
        with writing(kept) as place:
            shutil.copytree(version_folder, place)
    return kept


def waiting(pending: Path) -> Iterator[Path]:
    """The folders of the versions that wait, in the order in which they came."""
    if pending.is_dir():
        folders = [path for path in pending.iterdir() if not path.name.startswith(".")]
        yield from sorted(folders, key=lambda path: path.stat().st_mtime)


def remove(folder: Path) -> None:
    """Forget a version that is registered."""
    shutil.rmtree(folder)
