"""The banks of one support set: all that its trials learn from or are judged on, encoded once.

The backbone is frozen, so the patch tokens of a perturbed image never change: all trials share
them.

S support images, D draws, F families, V clean views of an image, N patch tokens, E joint width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apt_ray.anomalies.families import GUIDANCE, SELECTION, Family, harmless_copies
from apt_ray.anomalies.noise import add_noise, patch_labels
from apt_ray.anomalies.object_mask import object_masks
from apt_ray.anomalies.regions import move_onto, random_regions
from apt_ray.anomalies.spec import BankSpec
from apt_ray.errors import SettingsError, WriteError
from apt_ray.features.pixels import resize_pixels
from apt_ray.features.protocol import ImageEncoder, ImageFeatures
from apt_ray.files import writing
from apt_ray.machine import expanded
from apt_ray.tensors import seal, unseal

VIEWS = 4
"""Clean views of each support image: itself and its mirror images."""

DRAWS = 4
"""Noisy draws of each support image on each rung of the noise ladder."""

GUIDANCE_DRAWS, SELECTION_DRAWS = 1, 2
"""Perturbed draws of each support image in each family."""

_JUDGING_SEED = 2**32

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
        selection: judges a trial; None in a bank that is only fitted to.
        judged_clean_SVNE: the unperturbed images that `selection` was made from.
    """

    spec: BankSpec
    support: ImageFeatures
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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in _flatten(self).values())

    def to(self, device: torch.device) -> SupportBank:
        """The same bank, what is trained and judged on moved to another device."""
        return replace(
            self,
            clean_SVNE=self.clean_SVNE.to(device),
            noisy_SDNE={rung: tokens.to(device) for rung, tokens in self.noisy_SDNE.items()},
            noisy_labels_SDN=self.noisy_labels_SDN.to(device),
            noisy_views_SD=self.noisy_views_SD.to(device),
            guidance=self.guidance.to(device),
            selection=None if self.selection is None else self.selection.to(device),
            judged_clean_SVNE=self.judged_clean_SVNE.to(device),
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
    if (spec.fingerprint, len(spec.support)) != (encoder.fingerprint, len(images)):
        raise SettingsError(
            f"the bank is to be made from {len(spec.support)} images by encoder"
            f" {spec.fingerprint}, not from {len(images)} by {encoder.fingerprint}: make its spec"
            f" from these"
        )
    g = torch.Generator().manual_seed(spec.seed)
    whole = encoder.preprocess(images)
    pixels = resize_pixels(whole, encoder.prompt_size)
    shots, _, height, width = pixels.shape
    # With one image there is none to leave out: trials are judged on other crops and turns of it.
    source = pixels if shots > 1 else harmless_copies(pixels, 1, g)
    judged_views = 0 if shots > 1 or not spec.judged else VIEWS
    family_draws = GUIDANCE_DRAWS * len(GUIDANCE) + spec.judged * SELECTION_DRAWS * len(SELECTION)
    total = shots * (VIEWS + judged_views + len(spec.strengths) * DRAWS + family_draws)
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

    def encode_families(
        families: Mapping[str, Family], source: torch.Tensor, draws: int, g: torch.Generator
    ) -> FamilyBank:
        repeated = source.repeat_interleave(draws, 0)
        perturbed = [family(repeated, g) for family in families.values()]
        labels = [patch_labels(mask, encoder.grid) for _, mask in perturbed]
        return FamilyBank(
            names=tuple(families),
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

    # Seeded apart: wherever noise falls, trials are judged on the same pixels.
    judging = torch.Generator().manual_seed(_JUDGING_SEED + spec.seed)
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
        guidance=encode_families(GUIDANCE, pixels, GUIDANCE_DRAWS, g),
        selection=encode_families(SELECTION, source, SELECTION_DRAWS, judging)
        if spec.judged
        else None,
        judged_clean_SVNE=tokens(_views(source).flatten(0, 1)) if judged_views else clean_tokens,
    )


class BankCache:
    """Banks on disk, each under the digest of its spec.

    A file that is damaged or cannot be written is as good as none: the bank is encoded again.

    Args:
        folder: Where they lie; it is created when first written to.
        limit_bytes: Those used least recently are removed where there would be more.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = 8 * 2**30) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def load(self, spec: BankSpec) -> SupportBank | None:
        """The bank of a spec, if it is there and whole."""
        path = self._path(spec)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header = unseal(file.metadata() or {}, tensors)
            bank = _restore(tensors, json.loads(header))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, SettingsError):
            return None
        if bank.spec != spec:
            return None
        with suppress(OSError):
            os.utime(path)
        return bank

    def save(self, bank: SupportBank) -> None:
        """Write a bank, whole or not at all."""
        metadata = {
            "spec": bank.spec.model_dump(mode="json"),
            "guidance": bank.guidance.names,
            "selection": bank.selection and bank.selection.names,
        }
        tensors = {name: tensor.contiguous() for name, tensor in _flatten(bank).items()}
        with suppress(OSError, WriteError, SafetensorError):
            with writing(self._path(bank.spec)) as place:
                save_file(tensors, place, seal(json.dumps(metadata), tensors))
            self._make_room()

    def _path(self, spec: BankSpec) -> Path:
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


def default_cache_folder() -> Path:
    """Where banks are cached unless told otherwise: $XDG_CACHE_HOME/apt-ray, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or expanded(Path("~/.cache"))
    return Path(cache) / "apt-ray" / "banks"


def _flatten(bank: SupportBank) -> dict[str, torch.Tensor]:
    return {
        "support.tokens": bank.support.tokens_BNE,
        "support.cls": bank.support.cls_BE,
        **{f"support.layers.{layer}": x for layer, x in bank.support.layers.items()},
        "clean": bank.clean_SVNE,
        **{f"noisy.{strength!r}": x for strength, x in bank.noisy_SDNE.items()},
        "objects": bank.objects_SN,
        "noisy_labels": bank.noisy_labels_SDN,
        "noisy_views": bank.noisy_views_SD,
        "guidance.tokens": bank.guidance.tokens_FSDNE,
        "guidance.labels": bank.guidance.labels_FSDN,
        **(
            {}
            if bank.selection is None
            else {
                "selection.tokens": bank.selection.tokens_FSDNE,
                "selection.labels": bank.selection.labels_FSDN,
            }
        ),
        # Of several images the judged ones are the clean ones.
        **({} if bank.shots > 1 else {"judged_clean": bank.judged_clean_SVNE}),
    }


def _restore(tensors: dict[str, torch.Tensor], metadata: Mapping[str, Any]) -> SupportBank:
    def under(prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), tensor

    def families(kind: str) -> FamilyBank:
        return FamilyBank(
            names=tuple(metadata[kind]),
            tokens_FSDNE=tensors[f"{kind}.tokens"],
            labels_FSDN=tensors[f"{kind}.labels"],
        )

    return SupportBank(
        spec=BankSpec.parse(metadata["spec"]),
        support=ImageFeatures(
            tokens_BNE=tensors["support.tokens"],
            cls_BE=tensors["support.cls"],
            layers={int(layer): x for layer, x in under("support.layers.")},
        ),
        objects_SN=tensors["objects"],
        clean_SVNE=tensors["clean"],
        noisy_SDNE={float(strength): x for strength, x in under("noisy.")},
        noisy_labels_SDN=tensors["noisy_labels"],
        noisy_views_SD=tensors["noisy_views"],
        guidance=families("guidance"),
        selection=families("selection") if metadata["selection"] else None,
        judged_clean_SVNE=tensors.get("judged_clean", tensors["clean"]),
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
