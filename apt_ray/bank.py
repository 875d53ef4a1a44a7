"""The banks of one support set: all that its trials learn from or are judged on, encoded once.

The backbone is frozen, so the patch tokens of a perturbed image never change: all trials share
them.

S support images, D draws, F families, V clean views of an image, N patch tokens, E joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from apt_ray.backbone import FrozenCLIP, ImageFeatures
from apt_ray.config import NOISE_LADDER
from apt_ray.synthesis import (
    GUIDANCE,
    SELECTION,
    Family,
    add_noise,
    harmless_copies,
    patch_labels,
    random_regions,
)

DRAWS = 4
"""Noisy draws of each support image on each rung of the noise ladder."""

FAMILY_DRAWS = 2
"""Perturbed draws of each support image in each family."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyBank:
    """Images perturbed by families that no prompt learns from.

    Attributes:
        names: the F families.
        tokens_FSDNE: patch tokens, float16.
        labels_FSDN: patch labels, int8: 1 anomalous, 0 normal, -1 ignored.
    """

    names: tuple[str, ...]
    tokens_FSDNE: torch.Tensor
    labels_FSDN: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportBank:
    """All that is encoded for one support set, on the CPU: it can be sent to other processes.

    Attributes:
        support: features of the S support images as they are.
        clean_SVNE: patch tokens of each image and its mirror images, float16.
        noisy_SDNE: noise strength -> patch tokens of noisy draws, float16.
        noisy_labels_SDN: their patch labels, int8; the regions are the same at all strengths.
        guidance: judges whether the meta-prompt may move.
        selection: judges a trial.
        judged_clean_SVNE: the unperturbed images that `selection` was made from.
    """

    support: ImageFeatures
    clean_SVNE: torch.Tensor
    noisy_SDNE: Mapping[float, torch.Tensor]
    noisy_labels_SDN: torch.Tensor
    guidance: FamilyBank
    selection: FamilyBank
    judged_clean_SVNE: torch.Tensor

    @property
    def shots(self) -> int:
        """The number of support images."""
        return len(self.support)


def encode_support(
    backbone: FrozenCLIP,
    images: Sequence[Image.Image],
    *,
    seed: int,
    strengths: Sequence[float] = NOISE_LADDER,
    progress: Progress | None = None,
) -> SupportBank:
    """Perturb and encode a support set.

    Args:
        backbone: the frozen vision tower.
        images: the support images, RGB, of any size; at least one.
        seed: of all noise, regions and perturbations.
        strengths: the rungs of the noise ladder that trials may ask for.
        progress: called with (images encoded, images in all).
    """
    g = torch.Generator().manual_seed(seed)
    pixels = backbone.preprocess(images)
    shots, _, height, width = pixels.shape
    clean = _views(pixels)
    # With one image there is none to leave out: trials are judged on other crops and turns of it.
    judged = pixels if shots > 1 else harmless_copies(pixels, 1, g)

    drawn = _mirrored(pixels.repeat_interleave(DRAWS, 0), g)
    mask = random_regions(len(drawn), (height, width), g)
    noise = torch.randn(drawn.shape, generator=g)
    noisy_labels = patch_labels(mask, backbone.grid)

    clean_images = len(clean) + (0 if shots > 1 else len(clean))
    family_images = (len(GUIDANCE) + len(SELECTION)) * FAMILY_DRAWS * shots
    total = shots + clean_images + len(strengths) * len(drawn) + family_images
    done = 0

    def encode(batch: torch.Tensor) -> ImageFeatures:
        nonlocal done
        features = backbone.encode_in_batches(batch)
        done += len(batch)
        if progress is not None:
            progress(done, total)
        return features

    def by_image(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(shots, -1, *values.shape[1:])

    def tokens(batch: torch.Tensor) -> torch.Tensor:
        tokens_BNE = encode(batch).tokens_BNE.half().cpu()
        return by_image(tokens_BNE)

    def encode_families(families: Mapping[str, Family], source: torch.Tensor) -> FamilyBank:
        repeated = source.repeat_interleave(FAMILY_DRAWS, 0)
        perturbed = [family(repeated, g) for family in families.values()]
        labels = [patch_labels(mask, backbone.grid) for _, mask in perturbed]
        return FamilyBank(
            names=tuple(families),
            tokens_FSDNE=torch.stack([tokens(batch) for batch, _ in perturbed]),
            labels_FSDN=torch.stack([by_image(label) for label in labels]),
        )

    clean_tokens = tokens(clean)
    return SupportBank(
        support=encode(pixels).to(torch.device("cpu")),
        clean_SVNE=clean_tokens,
        noisy_SDNE={
            strength: tokens(add_noise(drawn, mask, noise, strength)) for strength in strengths
        },
        noisy_labels_SDN=by_image(noisy_labels),
        guidance=encode_families(GUIDANCE, pixels),
        selection=encode_families(SELECTION, judged),
        judged_clean_SVNE=clean_tokens if shots > 1 else tokens(_views(judged)),
    )


def _views(pixels: torch.Tensor) -> torch.Tensor:
    """Each image and its three mirror images, side by side: `(4 S, 3, H, W)`."""
    mirrors = [pixels, pixels.flip(-1), pixels.flip(-2), pixels.flip(-1, -2)]
    return torch.stack(mirrors, 1).flatten(0, 1)


def _mirrored(pixels: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Each image, mirrored left to right and top to bottom at random."""
    for axis in (-1, -2):
        flip_B111 = torch.rand(len(pixels), 1, 1, 1, generator=g) < 0.5
        pixels = torch.where(flip_B111, pixels.flip(axis), pixels)
    return pixels
