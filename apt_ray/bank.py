"""The banks of one support set: all that its trials learn from or are judged on, encoded once.

The backbone is frozen, so the patch tokens of a perturbed image never change: all trials share
them.

S support images, D draws, F families, V clean views of an image, N patch tokens, E joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.backbone import FrozenCLIP, ImageFeatures
from apt_ray.config import NOISE_LADDER
from apt_ray.object_mask import object_masks
from apt_ray.synthesis import (
    GUIDANCE,
    SELECTION,
    Family,
    add_noise,
    harmless_copies,
    move_onto,
    patch_labels,
    random_regions,
)

VIEWS = 4
"""Clean views of each support image: itself and its mirror images."""

DRAWS = 4
"""Noisy draws of each support image on each rung of the noise ladder."""

GUIDANCE_DRAWS, SELECTION_DRAWS = 1, 2
"""Perturbed draws of each support image in each family."""

Progress = Callable[[int, int], None]
Region = Literal["random", "object"]


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
        region: where the noise fell.
        object_mask: whether it was kept on the part.
        objects_SN: the patches that show the part, bool.
        clean_SVNE: patch tokens of each image and its mirror images, float16.
        noisy_SDNE: noise strength -> patch tokens of noisy draws, float16.
        noisy_labels_SDN: their patch labels, int8; the regions are the same at all strengths.
        noisy_views_SD: which clean view each draw was made from.
        guidance: judges whether the meta-prompt may move.
        selection: judges a trial; None in a bank that is only fitted to.
        judged_clean_SVNE: the unperturbed images that `selection` was made from.
    """

    support: ImageFeatures
    region: Region
    object_mask: bool
    objects_SN: torch.Tensor
    clean_SVNE: torch.Tensor
    noisy_SDNE: Mapping[float, torch.Tensor]
    noisy_labels_SDN: torch.Tensor
    noisy_views_SD: torch.Tensor
    guidance: FamilyBank
    selection: FamilyBank | None
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
    region: Region = "random",
    object_mask: bool = True,
    judged: bool = True,
    progress: Progress | None = None,
) -> SupportBank:
    """Perturb and encode a support set.

    Args:
        backbone: the frozen vision tower.
        images: the support images, RGB, of any size; at least one.
        seed: of all noise, regions and perturbations.
        strengths: the rungs of the noise ladder that trials may ask for.
        region: whether noise falls in random regions, or everywhere at once.
        object_mask: keep it on the part, where the backbone tells the part from its ground.
        judged: whether to encode what judges trials as well.
        progress: called with (images encoded, images in all).
    """
    g = torch.Generator().manual_seed(seed)
    pixels = backbone.preprocess(images)
    shots, _, height, width = pixels.shape
    # With one image there is none to leave out: trials are judged on other crops and turns of it.
    source = pixels if shots > 1 else harmless_copies(pixels, 1, g)
    judged_views = 0 if shots > 1 or not judged else VIEWS
    family_draws = GUIDANCE_DRAWS * len(GUIDANCE) + judged * SELECTION_DRAWS * len(SELECTION)
    total = shots * (VIEWS + judged_views + len(strengths) * DRAWS + family_draws)
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

    def encode_families(
        families: Mapping[str, Family], source: torch.Tensor, draws: int
    ) -> FamilyBank:
        repeated = source.repeat_interleave(draws, 0)
        perturbed = [family(repeated, g) for family in families.values()]
        labels = [patch_labels(mask, backbone.grid) for _, mask in perturbed]
        return FamilyBank(
            names=tuple(families),
            tokens_FSDNE=torch.stack([tokens(batch) for batch, _ in perturbed]),
            labels_FSDN=torch.stack([by_image(label) for label in labels]),
        )

    views_SV3HW = _views(pixels)
    clean = encode(views_SV3HW.flatten(0, 1)).to(torch.device("cpu"))
    support = clean[::VIEWS]
    objects_SN = object_masks(support, backbone.grid)
    if not object_mask:
        objects_SN = torch.ones_like(objects_SN)
    objects_SHW = F.interpolate(
        objects_SN.unflatten(1, (1, *backbone.grid)).float(), size=(height, width)
    )[:, 0]

    view_SD = torch.randint(VIEWS, (shots, DRAWS), generator=g)
    image_SD = torch.arange(shots)[:, None].expand(-1, DRAWS)
    drawn = views_SV3HW[image_SD, view_SD].flatten(0, 1)
    mask = _views(objects_SHW)[image_SD, view_SD].flatten(0, 1) > 0
    if region == "random":
        mask = move_onto(random_regions(len(drawn), (height, width), g), mask, g)
    noise = torch.randn(drawn.shape, generator=g)

    clean_tokens = by_image(clean.tokens_BNE.half())
    return SupportBank(
        support=support,
        region=region,
        object_mask=object_mask,
        objects_SN=objects_SN,
        clean_SVNE=clean_tokens,
        noisy_SDNE={
            strength: tokens(add_noise(drawn, mask, noise, strength)) for strength in strengths
        },
        noisy_labels_SDN=by_image(patch_labels(mask, backbone.grid)),
        noisy_views_SD=view_SD,
        guidance=encode_families(GUIDANCE, pixels, GUIDANCE_DRAWS),
        selection=encode_families(SELECTION, source, SELECTION_DRAWS) if judged else None,
        judged_clean_SVNE=tokens(_views(source).flatten(0, 1)) if judged_views else clean_tokens,
    )


def _views(images_SXHW: torch.Tensor) -> torch.Tensor:
    """Each image or mask and its three mirror images: `(S, 4, ..., H, W)`."""
    mirrors = [
        images_SXHW,
        images_SXHW.flip(-1),
        images_SXHW.flip(-2),
        images_SXHW.flip(-1, -2),
    ]
    return torch.stack(mirrors, 1)
