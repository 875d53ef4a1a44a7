"""Tensors in safetensors files that tell damage: a digest of everything stands in the header.

And whether tensors are those of a graph in the making, which `apt_ray/export` writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

_HEADER = "apt-ray"


def is_traced() -> bool:
    """Whether a graph is being made of what is computed: then nothing may depend on the number of
    images, nor on what only eager PyTorch can do."""
    is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return is_tracing or torch.compiler.is_compiling()


def seal(header: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The metadata of a safetensors file of `tensors`, on the CPU, which `unseal` checks.

    One entry, since several are written in any order: equal content makes equal files.

    Args:
        header: all that the file says beside the tensors, on one line.
    """
    return {_HEADER: f"{header}\n{_digest(header, tensors)}"}


def header_of(metadata: Mapping[str, str]) -> str:
    """The header as it stands there, damaged or not; KeyError if there is none."""
    return metadata[_HEADER].partition("\n")[0]


def unseal(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """The header, once it and the tensors prove to be those that were sealed; else ValueError."""
    header = header_of(metadata)
    if metadata[_HEADER].partition("\n")[2] != _digest(header, tensors):
        raise ValueError("the SHA-256 in it is not that of its content")
    return header


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """In hex, over the header and over name, dtype, shape and bytes of each tensor, by name."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
