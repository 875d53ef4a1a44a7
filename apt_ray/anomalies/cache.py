"""What was encoded of support sets, on disk: encoding is the dear part of a search.

A file is named by the digest of all that its content was made from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apt_ray.anomalies.spec import EncodedSpec
from apt_ray.errors import SettingsError, WriteError
from apt_ray.files import writing
from apt_ray.machine import cache_folder
from apt_ray.tensors import seal, unseal


class Encoded(Protocol):
    """Something that a cache keeps."""

    @property
    def spec(self) -> Any:
        """What it was made from."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""


SomeSpec = TypeVar("SomeSpec", bound=EncodedSpec)
Some = TypeVar("Some", bound=Encoded)


class EncodedCache(Generic[SomeSpec, Some]):
    """Encoded support sets on disk, each under the digest of its spec.

    A file that is damaged or cannot be written is as good as none: it is encoded again.

    Args:
        folder: Where they lie; it is created when first written to.
        restore: Makes one of its spec and tensors.
        limit_bytes: Those used least recently are removed where there would be more.
    """

    def __init__(
        self,
        folder: Path,
        restore: Callable[[SomeSpec, Mapping[str, torch.Tensor]], Some],
        *,
        limit_bytes: int = 8 * 2**30,
    ) -> None:
        self._folder, self._restore = folder, restore
        self._limit_bytes = limit_bytes

    def load(self, spec: SomeSpec) -> Some | None:
        """What was encoded of a spec, if it is there and whole."""
        path = self._path(spec)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header = unseal(file.metadata() or {}, tensors)
            if header != spec.model_dump_json():
                return None
            restored = self._restore(spec, tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, SettingsError):
            return None
        with suppress(OSError):
            os.utime(path)
        return restored

    def save(self, encoded: Some) -> None:
        """Write it whole or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in encoded.tensors().items()}
        with suppress(OSError, WriteError, SafetensorError):
            with writing(self._path(encoded.spec)) as place:
                save_file(tensors, place, seal(encoded.spec.model_dump_json(), tensors))
            self._make_room()

    def _path(self, spec: EncodedSpec) -> Path:
        return self._folder / f"{spec.digest}.safetensors"

    def _make_room(self) -> None:
        newest_first = sorted(
            ((file.stat(), file) for file in self._folder.glob("*.safetensors")),
            key=lambda entry: -entry[0].st_mtime,
        )
        total = 0
        for status, file in newest_first:
            total += status.st_size
            if total > self._limit_bytes:
                file.unlink(missing_ok=True)


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those whose names begin so, under the rest of their names."""
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


def default_cache_folder() -> Path:
    """Where it is kept unless told otherwise: $XDG_CACHE_HOME/apt-ray, or ~/.cache."""
    return cache_folder() / "banks"
