"""What judges trials without a single test image: each support image, perturbed, in front of a
memory that was made without it.

A trial is judged as its prompt set will serve, by the score rule over prompts and memory. What
depends on the memory alone, distances, is the same for all trials that have the same memory: it is
encoded once, and features are let go.

J judged images, F families, D draws, X images made of each, N patch tokens, E joint width, M_l
places of reference layer l.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from apt_ray.anomalies.cache import below
from apt_ray.anomalies.families import SELECTION, harmless_copies
from apt_ray.anomalies.noise import patch_labels
from apt_ray.anomalies.spec import JudgeSpec
from apt_ray.features.pixels import resize_pixels, to_pixels
from apt_ray.features.protocol import ImageEncoder, ImageFeatures
from apt_ray.prompts.remember import show

DRAWS = 2
"""Perturbed draws of each judged image in each family."""

COPIES = 4
"""Altered copies that stand for other images where there is a single support image."""

_PERTURBED_SIZE = 512
"""Pixels a side at which images are perturbed, whatever an encoder sees: it is to see the same
anomalies as others, and to be worth more if it sees finer ones."""

_SEED = 2**32
"""Seeds are counted from here: apart from those of banks."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a score rule reads of X images in front of the memory of each judged image.

    Attributes:
        tokens_JXNE: patch tokens, float16.
        cls_JXE: the whole images, float16.
        layers: reference layer -> distances `(J, X, M_l)`, float32.
    """

    tokens_JXNE: torch.Tensor
    cls_JXE: torch.Tensor
    layers: Mapping[int, torch.Tensor]

    def to(self, device: torch.device) -> Evidence:
        """The same on another device."""
        return Evidence(
            tokens_JXNE=self.tokens_JXNE.to(device),
            cls_JXE=self.cls_JXE.to(device),
            layers={layer: x.to(device) for layer, x in self.layers.items()},
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {
            "tokens": self.tokens_JXNE,
            "cls": self.cls_JXE,
            **{f"layers.{layer}": x for layer, x in self.layers.items()},
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor]) -> Evidence:
        """The evidence of these tensors."""
        return cls(
            tokens_JXNE=tensors["tokens"],
            cls_JXE=tensors["cls"],
            layers={int(layer): x for layer, x in below("layers.", tensors)},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """All that judges the trials of one support set, on the CPU: it can be sent to other processes.

    Attributes:
        spec: what it was made from.
        families: names of the F families.
        normal: of the judged images as they are; X is 1.
        perturbed: of the same, perturbed; X is F * D, the draws of a family side by side.
        labels_JXN: patch labels of these, int8: 1 anomalous, 0 normal, -1 ignored.
        smallest: layer -> standard deviation of its distances that is believed at least.
        widened: by which deviations among copies of one image fall short of those among images.
    """

    spec: JudgeSpec
    families: tuple[str, ...]
    normal: Evidence
    perturbed: Evidence
    labels_JXN: torch.Tensor
    smallest: Mapping[int, float]
    widened: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device) -> Judge:
        """The same judge on another device."""
        return replace(self, normal=self.normal.to(device), perturbed=self.perturbed.to(device))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as a cache keeps them."""
        return {
            **{f"normal.{name}": x for name, x in self.normal.tensors().items()},
            **{f"perturbed.{name}": x for name, x in self.perturbed.tensors().items()},
            "labels": self.labels_JXN,
            "smallest": torch.tensor(list(self.smallest.values()), dtype=torch.float64),
            "widened": torch.tensor(self.widened, dtype=torch.float64),
        }

    @classmethod
    def restore(cls, spec: JudgeSpec, tensors: Mapping[str, torch.Tensor]) -> Judge:
        """The judge of these `tensors`; KeyError or ValueError if they are of something else."""
        normal = Evidence.restore(dict(below("normal.", tensors)))
        return cls(
            spec=spec,
            families=tuple(SELECTION),
            normal=normal,
            perturbed=Evidence.restore(dict(below("perturbed.", tensors))),
            labels_JXN=tensors["labels"],
            smallest=dict(zip(normal.layers, tensors["smallest"].tolist(), strict=True)),
            widened=float(tensors["widened"]),
        )


def encode_judge(
    encoder: ImageEncoder,
    images: Sequence[Image.Image],
    spec: JudgeSpec,
    *,
    progress: Progress | None = None,
) -> Judge:
    """Perturb the support images and set them in front of memories.

    With several support images each is judged by the memory of the others; a single one by altered
    copies, in front of its memory.

    Args:
        encoder: whose fingerprint the spec names.
        images: the support images, RGB, of any size, those that the spec names.
        spec: what the judge is made from.
        progress: called with (judged images done, judged images in all).

    Raises:
        SettingsError: the spec is of another encoder, or of another number of images.
    """
    spec.check_source("judge", len(images), encoder.fingerprint)
    pixels = encoder.preprocess(images)
    shown = show(encoder.encode_in_batches(pixels), pixels, encoder, spec)
    g = torch.Generator().manual_seed(_SEED + spec.seed)
    source = to_pixels(images, _PERTURBED_SIZE)
    is_single = len(images) == 1
    judged_J3HW = harmless_copies(source, COPIES, g) if is_single else source
    normal: list[Evidence] = []
    perturbed: list[Evidence] = []
    labels = []
    for place, one_3HW in enumerate(judged_J3HW):
        memory = shown.memory(without=None if is_single else place)
        repeated = one_3HW.expand(DRAWS, -1, -1, -1)
        made = [family(repeated, g) for family in SELECTION.values()]

        def seen(pixels_X3HW: torch.Tensor) -> ImageFeatures:
            return encoder.encode_in_batches(resize_pixels(pixels_X3HW, encoder.input_size))

        for features, found in (
            (seen(one_3HW[None]), normal),
            (seen(torch.cat([one.pixels_B3HW for one in made])), perturbed),
        ):
            found.append(
                Evidence(
                    tokens_JXNE=features.tokens_BNE.half().cpu(),
                    cls_JXE=features.cls_BE.half().cpu(),
                    layers={layer: x.cpu() for layer, x in memory.distances(features).items()},
                )
            )
        labels.append(patch_labels(torch.cat([one.mask_BHW for one in made]), encoder.grid))
        if progress is not None:
            progress(place + 1, len(judged_J3HW))
    return Judge(
        spec=spec,
        families=tuple(SELECTION),
        normal=_stack(normal),
        perturbed=_stack(perturbed),
        labels_JXN=torch.stack(labels),
        smallest=shown.smallest(),
        widened=shown.widened,
    )


def _stack(images: Sequence[Evidence]) -> Evidence:
    return Evidence(
        tokens_JXNE=torch.stack([one.tokens_JXNE for one in images]),
        cls_JXE=torch.stack([one.cls_JXE for one in images]),
        layers={
            layer: torch.stack([one.layers[layer] for one in images]) for layer in images[0].layers
        },
    )
