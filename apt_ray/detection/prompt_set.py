"""PromptSet: everything that one category needs beside the backbone, in one safetensors file.

Tensors: `text_features` (P, E), `contexts` (P, L, C), `meta_features` (2, E), and
`memory.<layer>` (M, D) in float16. Newer files also have `thumbnail.<n>`, the bytes of small
JPEG files of the support images, for people alone, and where defects were confirmed `kinds`
(X, D) in float16, what these look like. The header holds everything else as JSON, and a
SHA-256 over all of it. Nothing is ever unpickled.

P prompts (0 normal, the others anomalous), E joint width, L context length, C token width, M
patches, D width, X confirmed defects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from apt_ray.config import BackboneSpec, FitSettings, Settings
from apt_ray.data.distinct import Copies
from apt_ray.detection.calibration import Threshold
from apt_ray.detection.kinds import Kinds
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import RULE_VERSION, Scales
from apt_ray.errors import PromptSetError
from apt_ray.files import StrPath, write_whole
from apt_ray.levels import FORMER, Reading
from apt_ray.tensors import header_of, seal, unseal

FORMAT_VERSION = 1
THUMBNAIL_SIDE = 448
"""Pixels of the longer side of a support image that is kept to be looked at."""

_FIRST_RULE = 1  # of files that do not say
_MEMORY = "memory."
_THUMBNAIL = "thumbnail."
_KINDS = "kinds"


class UsedFeedback(Settings):
    """What one caller said of one image, as a version has taken it in."""

    id: str
    by: str = Field(description="Who said it.")
    sha256: str = Field(description="Of the image's file.")
    use: Literal["memory", "calibration"]


class Provenance(Settings):
    """Where a prompt set comes from: all that its file says beside the tensors."""

    format_version: int = FORMAT_VERSION
    rule_version: int = Field(
        default=RULE_VERSION, description="Of the score rule that its threshold belongs to."
    )
    library_version: str
    category: str
    backbone: BackboneSpec
    fingerprint: str = Field(description="Of the backbone whose features it was fitted to.")
    settings: FitSettings
    shots: int = Field(ge=1)
    support_hash: str = Field(description="SHA-256 over the files of the support images.")
    support_names: tuple[str, ...]
    copies: Copies = Field(
        default=(),
        description="Files that were given and left out, each with the one whose pixels it has.",
    )
    created: str = Field(description="Time of the fit, ISO 8601 in UTC.")
    threshold: Threshold
    scales: Scales = Field(description="What its evidence is measured in.")
    metrics: dict[str, float] = Field(default_factory=dict)
    accepted: int = Field(
        default=0, ge=0, description="False alarms that joined its memory after the fit."
    )
    feedback: tuple[UsedFeedback, ...] = Field(
        default=(), description="What people said that it has taken in since the fit."
    )
    kinds: dict[str, PositiveInt] = Field(
        default_factory=dict,
        exclude_if=lambda kinds: not kinds,
        description="Kind of defect that it names -> confirmed examples of it.",
    )
    reading: Reading = Field(
        default=FORMER, description="How image files were read, and are to be read."
    )
    probe_score: float | None = Field(
        default=None,
        description="`Detector.probe_score` when it was fitted: what must come out again.",
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptSet:
    """The fitted artifact of one category.

    Attributes:
        provenance: its origin, settings and threshold.
        text_features: `(P, E)` float32, L2-normalised; row 0 normal, the others anomalous.
        contexts: `(P, L, C)` float32, the learned prompt contexts.
        meta_features: `(2, E)` float32, the meta-prompt at the end of the training.
        memory: features of the support images.
        thumbnails: JPEG files of the support images at `THUMBNAIL_SIDE`, in the order of their
            names; empty in files from before they were kept.
        kinds: what kinds of defects it names; None where none were confirmed.
    """

    provenance: Provenance
    text_features: torch.Tensor
    contexts: torch.Tensor
    meta_features: torch.Tensor
    memory: ReferenceMemory
    thumbnails: tuple[bytes, ...] = ()
    kinds: Kinds | None = None

    @property
    def category(self) -> str:
        return self.provenance.category

    @property
    def backbone(self) -> BackboneSpec:
        return self.provenance.backbone

    @property
    def fingerprint(self) -> str:
        return self.provenance.fingerprint

    @property
    def settings(self) -> FitSettings:
        return self.provenance.settings

    @property
    def threshold(self) -> Threshold:
        return self.provenance.threshold

    @property
    def reading(self) -> Reading:
        return self.provenance.reading

    @property
    def metrics(self) -> dict[str, float]:
        return self.provenance.metrics

    @property
    def support_hash(self) -> str:
        return self.provenance.support_hash

    def with_metrics(self, metrics: Mapping[str, float]) -> PromptSet:
        """The same prompt set with further figures."""
        provenance = self.provenance.model_copy(update={"metrics": {**self.metrics, **metrics}})
        return replace(self, provenance=provenance)

    def with_threshold(self, threshold: Threshold) -> PromptSet:
        """The same prompt set, deciding by another threshold."""
        provenance = self.provenance.model_copy(update={"threshold": threshold})
        return replace(self, provenance=provenance)

    def with_category(self, category: str) -> PromptSet:
        """The same prompt set under another category's name."""
        provenance = self.provenance.model_copy(update={"category": category})
        return replace(self, provenance=provenance)

    def with_kinds(self, kinds: Kinds) -> PromptSet:
        """The same prompt set, naming these kinds of defects."""
        provenance = self.provenance.model_copy(update={"kinds": dict(kinds.counts)})
        return replace(self, provenance=provenance, kinds=kinds)

    def to_bytes(self) -> bytes:
        """The content of its safetensors file."""
        tensors = {
            "text_features": self.text_features,
            "contexts": self.contexts,
            "meta_features": self.meta_features,
            **{f"{_MEMORY}{layer}": tokens for layer, tokens in self.memory.layers.items()},
            **{
                f"{_THUMBNAIL}{number}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
                for number, data in enumerate(self.thumbnails)
            },
            **({} if self.kinds is None else {_KINDS: self.kinds.examples_XD}),
        }
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return save(contiguous, seal(self.provenance.model_dump_json(), contiguous))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "prompt set") -> PromptSet:
        """The prompt set in a file's content; PromptSetError tells what is wrong with `source`."""
        remedy = "fit or register the category again"
        try:
            metadata = _read_metadata(data)
            tensors = load(data)
            _check_versions(header_of(metadata), source, remedy)
            header = unseal(metadata, tensors)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise PromptSetError(
                f"{source} is damaged or not a prompt set of apt-ray ({error}): copy it again from"
                f" where it came, or {remedy}"
            ) from error
        try:
            provenance = Provenance.model_validate_json(header)
        except ValidationError as error:
            raise PromptSetError(
                f"{source} was not written by this version of apt-ray"
                f" ({error.error_count()} fields differ, first {error.errors()[0]['loc']}): use the"
                f" version that wrote it, or {remedy}"
            ) from error
        _check_shapes(tensors, provenance, source, remedy)
        memory = {
            int(name.removeprefix(_MEMORY)): tensor
            for name, tensor in tensors.items()
            if name.startswith(_MEMORY)
        }
        return cls(
            provenance=provenance,
            text_features=tensors["text_features"],
            contexts=tensors["contexts"],
            meta_features=tensors["meta_features"],
            memory=ReferenceMemory(memory),
            thumbnails=tuple(tensors[name].numpy().tobytes() for name in _thumbnails(tensors)),
            kinds=Kinds(counts=provenance.kinds, examples_XD=tensors[_KINDS])
            if provenance.kinds
            else None,
        )

    def save(self, path: StrPath) -> None:
        """Write the file whole or not at all; WriteError if it cannot be written."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: StrPath) -> PromptSet:
        """Read a file; PromptSetError if it is missing, damaged or of another format."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise PromptSetError(
                f"cannot read {path} ({error.strerror}): check the path, or create it with"
                f" `apt-ray fit`"
            ) from error
        return cls.from_bytes(data, source=str(path))


def _read_metadata(data: bytes) -> dict[str, str]:
    """The metadata in a safetensors header, which its own reader only gives for files."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def _check_versions(header: str, source: str, remedy: str) -> None:
    """PromptSetError if the header says that it is of another format or another score rule."""
    try:
        said = json.loads(header)
        found = said["format_version"], said.get("rule_version", _FIRST_RULE)
    except (ValueError, KeyError, AttributeError, TypeError):
        return  # what is wrong with it is said by whoever reads all of it
    if found[0] != FORMAT_VERSION:
        raise PromptSetError(
            f"{source} has format {found[0]}, this version of apt-ray reads {FORMAT_VERSION}:"
            f" install the version that wrote it, or {remedy}"
        )
    if found[1] != RULE_VERSION:
        raise PromptSetError(
            f"{source} was fitted under score rule {found[1]}, this version of apt-ray scores by"
            f" rule {RULE_VERSION}, under which its threshold means nothing: install the version"
            f" that wrote it, or {remedy}"
        )


def _thumbnails(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the thumbnails, in their order; what misses its predecessor is none."""
    names: list[str] = []
    while (name := f"{_THUMBNAIL}{len(names)}") in tensors:
        names.append(name)
    return names


def _check_shapes(
    tensors: dict[str, torch.Tensor], provenance: Provenance, source: str, remedy: str
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    memories = {f"{_MEMORY}{layer}" for layer in provenance.scales.layers}
    kinds = {_KINDS} if provenance.kinds else set()
    thumbnails = set(_thumbnails(tensors))
    text = shapes.get("text_features", ())
    contexts = shapes.get("contexts", ())
    fits = (
        set(shapes)
        == {"text_features", "contexts", "meta_features", *memories, *kinds, *thumbnails}
        and len(text) == 2
        and text[0] >= 2
        and shapes["meta_features"] == (2, text[1])
        and len(contexts) == 3
        and contexts[0] == text[0]
        and memories
        and all(len(shapes[name]) == 2 and shapes[name][0] > 0 for name in memories)
        and all(
            shapes[name] == (sum(provenance.kinds.values()), sum(shapes[m][1] for m in memories))
            for name in kinds
        )
        and all(
            tensor.dtype == (torch.float16 if name in memories | kinds else torch.float32)
            and bool(tensor.isfinite().all())
            for name, tensor in tensors.items()
            if name not in thumbnails
        )
        and all(
            tensors[name].dtype == torch.uint8 and len(shapes[name]) == 1 for name in thumbnails
        )
    )
    if not fits:
        found = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
        raise PromptSetError(f"{source} holds tensors that do not fit together ({found}): {remedy}")
