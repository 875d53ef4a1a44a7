"""The bank of one support set: all that prompts learn from, encoded once.

The backbone is frozen, so the patch tokens of a perturbed image never change: all trials share
them.

S support images, D draws, F families, V clean views of an image, N patch tokens, E joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.anomalies.cache import below
from apt_ray.anomalies.families import GUIDANCE
from apt_ray.anomalies.noise import add_noise, patch_labels
from apt_ray.anomalies.object_mask import object_masks
from apt_ray.anomalies.regions import move_onto, random_regions
from apt_ray.anomalies.spec import BankSpec
from apt_ray.features.pixels import resize_pixels
from apt_ray.features.protocol import ImageEncoder, ImageFeatures

VIEWS = 4
"""Clean views of each support image: itself and its mirror images."""

DRAWS = 4
"""Noisy draws of each support image on each rung of the noise ladder."""

GUIDANCE_DRAWS = 1
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

    def to(self, device: torch.device) -> FamilyBank:
        """The same bank on another device."""
        return replace(
            self, tokens_FSDNE=self.tokens_FSDNE.to(device), labels_FSDN=self.labels_FSDN.to(device)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportBank:
    """All that is encoded for one support set, on the CPU: it can be sent to other processes.

    Attributes:
        spec: what it was made from.
        support: features of the S support images as they are.
        objects_SN: the places of the reference grid that show the part, bool.
        clean_SVNE: patch tokens of each image and its mirror images, float16.
        noisy_SDNE: noise strength -> patch tokens of noisy draws, float16.
        noisy_labels_SDN: their patch labels, int8; the regions are the same at all strengths.
        noisy_views_SD: which clean view each draw was made from.
        guidance: judges whether the meta-prompt may move.
    """

    spec: BankSpec
    support: ImageFeatures
    objects_SN: torch.Tensor
    clean_SVNE: torch.Tensor
    noisy_SDNE: Mapping[float, torch.Tensor]
    noisy_labels_SDN: torch.Tensor
    noisy_views_SD: torch.Tensor
    guidance: FamilyBank

    @property
    def shots(self) -> int:
        """The number of support images."""
        return len(self.support)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device) -> SupportBank:
        """The same bank, what is trained on moved to another device."""
        return replace(
            self,
            clean_SVNE=self.clean_SVNE.to(device),
            noisy_SDNE={rung: tokens.to(device) for rung, tokens in self.noisy_SDNE.items()},
            noisy_labels_SDN=self.noisy_labels_SDN.to(device),
            noisy_views_SD=self.noisy_views_SD.to(device),
            guidance=self.guidance.to(device),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as a cache keeps them."""
        return {
            "support.tokens": self.support.tokens_BNE,
            "support.cls": self.support.cls_BE,
            **{f"support.layers.{layer}": x for layer, x in self.support.layers.items()},
            "clean": self.clean_SVNE,
            **{f"noisy.{strength!r}": x for strength, x in self.noisy_SDNE.items()},
            "objects": self.objects_SN,
            "noisy_labels": self.noisy_labels_SDN,
            "noisy_views": self.noisy_views_SD,
            "guidance.tokens": self.guidance.tokens_FSDNE,
            "guidance.labels": self.guidance.labels_FSDN,
        }

    @classmethod
    def restore(cls, spec: BankSpec, tensors: Mapping[str, torch.Tensor]) -> SupportBank:
        """The bank of these `tensors`; KeyError or ValueError if they are of something else."""
        return cls(
            spec=spec,
            support=ImageFeatures(
                tokens_BNE=tensors["support.tokens"],
                cls_BE=tensors["support.cls"],
                layers={int(layer): x for layer, x in below("support.layers.", tensors)},
            ),
            objects_SN=tensors["objects"],
            clean_SVNE=tensors["clean"],
            noisy_SDNE={float(strength): x for strength, x in below("noisy.", tensors)},
            noisy_labels_SDN=tensors["noisy_labels"],
            noisy_views_SD=tensors["noisy_views"],
            guidance=FamilyBank(
                names=tuple(GUIDANCE),
                tokens_FSDNE=tensors["guidance.tokens"],
                labels_FSDN=tensors["guidance.labels"],
            ),
        )


def encode_support(
    encoder: ImageEncoder,
    images: Sequence[Image.Image],
    spec: BankSpec,
    *,
    progress: Progress | None = None,
) -> SupportBank:
    """Perturb and encode a support set.

    Args:
        encoder: whose fingerprint the spec names.
        images: the support images, RGB, of any size, those that the spec names.
        spec: what the bank is made from.
        progress: called with (images encoded, images in all).

    Raises:
        SettingsError: the spec is of another encoder, or of another number of images.
    """
    spec.check_source("bank", len(images), encoder.fingerprint)
    g = torch.Generator().manual_seed(spec.seed)
    whole = encoder.preprocess(images)
    pixels = resize_pixels(whole, encoder.prompt_size)
    shots, _, height, width = pixels.shape
    total = shots * (VIEWS + len(spec.strengths) * DRAWS + GUIDANCE_DRAWS * len(GUIDANCE))
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    def by_image(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(shots, -1, *values.shape[1:])

    def tokens(batch: torch.Tensor) -> torch.Tensor:
        tokens_BNE = encoder.encode_tokens(batch).half().cpu()
        count(len(batch))
        return by_image(tokens_BNE)

    def encode_guidance() -> FamilyBank:
        repeated = pixels.repeat_interleave(GUIDANCE_DRAWS, 0)
        perturbed = [family(repeated, g) for family in GUIDANCE.values()]
        labels = [patch_labels(mask, encoder.grid) for _, mask in perturbed]
        return FamilyBank(
            names=tuple(GUIDANCE),
            tokens_FSDNE=torch.stack([tokens(batch) for batch, _ in perturbed]),
            labels_FSDN=torch.stack([by_image(label) for label in labels]),
        )

    views_SV3HW = _views(pixels)
    support = encoder.encode_in_batches(whole).to(torch.device("cpu"))
    count(shots)
    mirrored = tokens(views_SV3HW[:, 1:].flatten(0, 1))
    clean_tokens = torch.cat([support.tokens_BNE.half()[:, None], mirrored], dim=1)
    objects_SN = object_masks(encoder.encode_places(pixels), encoder.grid)
    if not spec.object_mask:
        objects_SN = torch.ones_like(objects_SN)
    objects_SHW = F.interpolate(
        objects_SN.unflatten(1, (1, *encoder.grid)).float(), size=(height, width)
    )[:, 0]

    view_SD = torch.randint(VIEWS, (shots, DRAWS), generator=g)
    image_SD = torch.arange(shots)[:, None].expand(-1, DRAWS)
    drawn = views_SV3HW[image_SD, view_SD].flatten(0, 1)
    mask = _views(objects_SHW)[image_SD, view_SD].flatten(0, 1) > 0
    if spec.region == "random":
        mask = move_onto(random_regions(len(drawn), (height, width), g), mask, g)
    noise = torch.randn(drawn.shape, generator=g)

    return SupportBank(
        spec=spec,
        support=support,
        objects_SN=objects_SN,
        clean_SVNE=clean_tokens,
        noisy_SDNE={
            strength: tokens(add_noise(drawn, mask, noise, strength)) for strength in spec.strengths
        },
        noisy_labels_SDN=by_image(patch_labels(mask, encoder.grid)),
        noisy_views_SD=view_SD,
        guidance=encode_guidance(),
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
