"""What was drawn of a version when it was registered, as the registry keeps it."""

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt_ray.registry import Registry

_KEPT_VERSIONS = 4
"""Of some 1 MB each; whoever looks at a version asks for all of its pictures."""


class VersionPictures:
    """The pictures of versions; those of the last few are kept in memory.

    Args:
        registry: opens the registry.
    """

    def __init__(self, registry: "Callable[[], Registry]") -> None:
        self._open_registry = registry
        self._kept: OrderedDict[tuple[str, int], dict[str, bytes]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def of(self, category: str, version: int) -> dict[str, bytes] | None:
        """Name -> PNG file of a version, by name; None of an unknown version.

        Raises RegistryError.
        """
        key = category, version
        async with self._lock:  # or a page that asks for all of them at once loads them as often
            if key not in self._kept:
                found = await asyncio.to_thread(_load, self._open_registry, category, version)
                if found is None:
                    return None
                self._kept[key] = found
                if len(self._kept) > _KEPT_VERSIONS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def _load(
    open_registry: "Callable[[], Registry]", category: str, version: int
) -> dict[str, bytes] | None:
    from apt_ray.registry.contents import PICTURES  # with torch: for the controller only

    registry = open_registry()
    if version not in registry.versions(category):
        return None
    registered = registry.resolve(category, str(version))
    with tempfile.TemporaryDirectory(prefix="apt-ray-") as folder:
        found = registry.download(registered, PICTURES, Path(folder))
        files = sorted(found.glob("*.png")) if found else []
        return {file.stem: file.read_bytes() for file in files}
