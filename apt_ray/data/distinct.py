"""Images told apart by what they show: copies teach nothing, and vouch for nothing."""

import hashlib
from typing import TypeAlias

from PIL import Image

from apt_ray.files import AnyPath, location
from apt_ray.text import printable

Copies: TypeAlias = tuple[tuple[str, str], ...]
"""Names of files that were left out, each with that of the file that has the same pixels."""

_NAMED = 3


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of the pixels, in hex: the same whatever the file's name, format and metadata."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class Distinct:
    """Takes images in, each content once, and notes the copies that it refuses."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._copies: list[tuple[str, str]] = []

    @property
    def copies(self) -> Copies:
        """What was refused, in the order of asking."""
        return tuple(self._copies)

    def admit(self, path: AnyPath, digest: str) -> bool:
        """Whether none before this file had the same `pixel_digest`."""
        name = printable(location(path).name)
        if first := self._names.get(digest):
            self._copies.append((name, first))
            return False
        self._names[digest] = name
        return True


def describe_copies(copies: Copies) -> str:
    """How many there are and of what, in one sentence; empty if there are none."""
    if not copies:
        return ""
    named = ", ".join(f"{copy} of {first}" for copy, first in copies[:_NAMED])
    further = ", ..." if len(copies) > _NAMED else ""
    count = "1 image is a copy" if len(copies) == 1 else f"{len(copies)} images are copies"
    return f"{count} by the pixels and left out: {named}{further}"
