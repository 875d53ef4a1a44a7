"""FrozenCLIP: images to patch tokens, prompt contexts to text features.

B images, N patch tokens, E joint width, D width of the vision tower, C token width, L context
length, T texts, S positions of a text sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from apt_ray.config import BACKBONE, BUILTIN, BackboneSpec
from apt_ray.errors import BackboneError
from apt_ray.features.attention import locality_mask
from apt_ray.features.builtin.apt_mini import load_builtin
from apt_ray.features.constants import BackboneConstants, published_constants
from apt_ray.features.fingerprint import fingerprint
from apt_ray.features.frozen_text import FrozenTextTower
from apt_ray.features.pixels import resize_pixels, to_pixels
from apt_ray.features.protocol import ImageFeatures, ReferenceEncoder
from apt_ray.features.reference_encoder import load_reference_encoder
from apt_ray.features.torchvision_guard import import_open_clip
from apt_ray.features.towers import run_vision_tower
from apt_ray.tensors import is_traced

if TYPE_CHECKING:
    from open_clip import CLIP

_TILES_PER_PASS = {"cpu": 16}
"""Tiles in one pass through the vision tower: more gain nothing on a CPU. Elsewhere
`_MOST_TILES_PER_PASS` fills a large GPU with the smaller models."""


_MOST_TILES_PER_PASS = 64


class FrozenCLIP:
    """A CLIP of open_clip with native towers, read patch by patch; none of its weights ever change.

    Build one with `load_backbone`.

    Attributes:
        spec: what it was loaded from.
        constants: how its similarities become probabilities.
        input_size: pixels a side of the square that an image is resized to: what the larger of
            the two encoders sees.
        tiles: tiles a side that the square is cut into; the vision tower sees one at a time.
        prompt_size: pixels a side of the square that the vision tower sees, tile by tile.
        grid: (rows, columns) of patches in the whole square.
        reference_grid: (rows, columns) of the places that the reference memory compares.
        fingerprint: hex digest over the weights and everything else that shapes the features.
        model, tokenize: what it was built from, for methods that read CLIP in another way.
    """

    def __init__(
        self,
        model: CLIP,
        tokenize: Callable[[list[str]], torch.Tensor],
        *,
        spec: BackboneSpec,
        constants: BackboneConstants,
        device: str = "cpu",
    ) -> None:
        visual = model.visual
        patch = visual.patch_size[0]
        size = spec.input_size or visual.image_size[0]
        if size % patch or size < visual.image_size[0]:
            raise BackboneError(
                f"input size {size} does not suit {spec.name}: choose a multiple of {patch} that is"
                f" at least {visual.image_size[0]}"
            )
        blocks = len(visual.transformer.resblocks)
        own_layers = spec.reference_layers if spec.reads == BACKBONE else None
        layers = own_layers or constants.reference_layers
        if max(layers) >= blocks or min(layers) < 0 or spec.locality_blocks > blocks:
            raise BackboneError(
                f"{spec.name} has blocks 0 to {blocks - 1}: choose reference_layers among them, and"
                f" at most {blocks} locality_blocks (got {layers} and {spec.locality_blocks})"
            )
        self.spec = spec
        self.constants = constants.model_copy(update={"reference_layers": layers})
        self.tiles = spec.tiles
        self.prompt_size = spec.tiles * size
        self.grid = (self.prompt_size // patch, self.prompt_size // patch)
        self._reference = load_reference_encoder(spec, device=device)
        self.reference_grid = self._reference.grid if self._reference else self.grid
        self.input_size = max(
            self.prompt_size, self._reference.input_size if self._reference else 0
        )
        tile_grid = (size // patch, size // patch)
        self.device = torch.device(device)
        self.fingerprint = _fingerprint(model, spec, self.constants, size, self._reference)
        self._encode: Callable[[torch.Tensor], ImageFeatures] | None = None
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.tokenize = tokenize
        self._mean_3 = torch.tensor(visual.image_mean, device=self.device)
        self._std_3 = torch.tensor(visual.image_std, device=self.device)
        position_SD = resize_position_embedding(visual.positional_embedding, tile_grid)
        self._dtype = getattr(torch, spec.precision)
        self._position_SD = position_SD.to(self._dtype)
        radius = spec.locality_radius if spec.attention == "locality" else max(tile_grid)
        self._local_blocks = spec.locality_blocks if spec.attention == "locality" else 0
        self._mask_SS = locality_mask(tile_grid, radius).to(self.device)
        vocabulary_NC = model.token_embedding.weight
        start, end = tokenize([""])[0][:2].tolist()
        start_C, self._end_C = vocabulary_NC[start].clone(), vocabulary_NC[end].clone()
        self.token_width = vocabulary_NC.shape[1]
        self.token_std = float(vocabulary_NC.std())
        self.model.to(self._dtype)
        self._text_tower = FrozenTextTower(self.model, start_C.to(self._dtype))
        self.max_context_length = model.context_length - 2

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images of any size -> pixels `(B, 3, H, W)`, float32 in 0..1, H = W = input_size.

        The whole image is resized (bicubic, antialiased); nothing is cropped.
        """
        return to_pixels(images, self.input_size)

    def encode_by(self, encode: Callable[[torch.Tensor], ImageFeatures]) -> None:
        """Let another runtime do the work of `encode_images`, which gives the same features."""
        self._encode = encode

    def drop_vision(self) -> None:
        """Free the vision tower, in a process that only trains prompts: most of a ViT-B-16.

        From then on images cannot be encoded.
        """
        del self.model.visual
        self._reference = None

    @torch.no_grad()
    def encode_images(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        """Features of preprocessed pixels in 0..1; mean and deviation are applied here."""
        if self._encode is not None and not is_traced():
            return self._encode(pixels_B3HW)
        pixels_B3HW = pixels_B3HW.to(self.device)
        joint_XSE, outputs = self._see(resize_pixels(pixels_B3HW, self.prompt_size))
        cls_BE = joint_XSE[:, 0].unflatten(0, (-1, self.tiles**2)).mean(1)
        return ImageFeatures(
            tokens_BNE=self._join(joint_XSE[:, 1:]),
            cls_BE=F.normalize(cls_BE, dim=-1),
            layers=(
                self._reference.encode(resize_pixels(pixels_B3HW, self._reference.input_size))
                if self._reference
                else {
                    layer: F.normalize(self._join(outputs[layer][:, 1:]).float(), dim=-1)
                    for layer in self.constants.reference_layers
                }
            ),
        )

    @torch.no_grad()
    def encode_places(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` of the shallowest of its own reference layers, L2-normalised, of
        pixels of `prompt_size`."""
        layer = min(self.constants.reference_layers)
        return torch.cat(
            [
                F.normalize(self._join(self._see(batch)[1][layer][:, 1:]).float(), dim=-1)
                for batch in pixels_B3HW.to(self.device).split(self._images_per_pass)
            ]
        )

    @torch.no_grad()
    def encode_tokens(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """The patch tokens alone, `(B, N, E)`, of pixels of `prompt_size`; passes of bounded
        memory."""
        return torch.cat(
            [
                self._join(self._see(batch.to(self.device))[0][:, 1:])
                for batch in pixels_B3HW.split(self._images_per_pass)
            ]
        )

    def _see(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the vision tower says of the tiles of images: `[CLS, patches]` in the joint space,
        L2-normalised, and the output of every block."""
        pixels_B3HW = (pixels_B3HW - self._mean_3[:, None, None]) / self._std_3[:, None, None]
        joint_XSE, outputs = run_vision_tower(
            self.model.visual,
            _cut(pixels_B3HW, self.tiles),
            self._position_SD,
            mask_SS=self._mask_SS,
            local_blocks=self._local_blocks,
            value_value=self.spec.attention == "value_value",
        )
        return F.normalize(joint_XSE.float(), dim=-1), outputs

    def _join(self, tokens_XNE: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the tiles of each image -> those of the image, row by row."""
        tiles, rows, columns = self.tiles, self.grid[0] // self.tiles, self.grid[1] // self.tiles
        tokens = tokens_XNE.unflatten(0, (-1, tiles, tiles)).unflatten(3, (rows, columns))
        joined_BNE: torch.Tensor = tokens.transpose(2, 3).flatten(1, 4)
        return joined_BNE

    def encode_in_batches(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        """`encode_images`, a bounded number of tiles a forward pass, to bound its memory."""
        return ImageFeatures.concatenate(
            [self.encode_images(batch) for batch in pixels_B3HW.split(self._images_per_pass)]
        )

    @property
    def _images_per_pass(self) -> int:
        most = _TILES_PER_PASS.get(self.device.type, _MOST_TILES_PER_PASS)
        return max(1, most // self.tiles**2)

    def encode_contexts(self, contexts_TLC: torch.Tensor, lengths_T: torch.Tensor) -> torch.Tensor:
        """Prompt contexts -> text features `(T, E)`, float32, L2-normalised, differentiable.

        Each text is `[SOS] v_1 .. v_l [EOS]` with its own length l <= L; what stands behind its
        [EOS] is ignored. The text tower is causal, so nothing behind the longest [EOS] is computed.
        """
        lengths_T = lengths_T.to(self.device)
        x_TSC = F.pad(contexts_TLC, (0, 0, 0, 1))
        place_S = torch.arange(x_TSC.shape[1], device=self.device)
        is_end_TS = place_S == lengths_T[:, None]
        return self._text_features(torch.where(is_end_TS[..., None], self._end_C, x_TSC), lengths_T)

    def embed_words(self, text: str) -> torch.Tensor:
        """Written words -> their token embeddings `(L, C)`, float32, as a context has them."""
        ids_S = self.tokenize([text])[0].to(self.device)
        # [EOS] has the highest id of all.
        words_LC: torch.Tensor = self.model.token_embedding.weight[ids_S[1 : int(ids_S.argmax())]]
        return words_LC.float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Written texts -> text features `(T, E)`, float32, L2-normalised."""
        ids_TS = self.tokenize(list(texts)).to(self.device)[:, 1:]
        # [EOS] has the highest id of all.
        end_T = ids_TS.argmax(1)
        x_TSC = self.model.token_embedding(ids_TS[:, : int(end_T.max()) + 1])
        return self._text_features(x_TSC, end_T)

    def _text_features(self, x_TSC: torch.Tensor, end_T: torch.Tensor) -> torch.Tensor:
        """Texts, embedded from behind [SOS] to their end at `end_T` -> `(T, E)`, float32,
        L2-normalised."""
        end_TC = self._text_tower(x_TSC.to(self._dtype), end_T)
        projection: nn.Linear | torch.Tensor | None = self.model.text_projection
        if isinstance(projection, nn.Linear):
            end_TC = projection(end_TC)
        elif projection is not None:
            end_TC = end_TC @ projection
        return F.normalize(end_TC.float(), dim=-1)


def load_backbone(spec: BackboneSpec | None = None, *, device: str = "cpu") -> FrozenCLIP:
    """The backbone that `spec` names, ready for inference; BackboneError says what to change.

    Args:
        device: of torch, such as "cpu" or "cuda:1"; it must be there and compute.
    """
    spec = spec or BackboneSpec()
    _check_device(device)
    if spec.name == BUILTIN:
        builtin = load_builtin()
        return FrozenCLIP(
            builtin.model,
            builtin.tokenizer,
            spec=spec,
            constants=builtin.constants,
            device=device,
        )
    open_clip = import_open_clip()
    model = _create_model(open_clip, spec)
    constants = published_constants(
        float(model.logit_scale.detach().exp()), blocks=len(model.visual.transformer.resblocks)
    )
    return FrozenCLIP(
        model, open_clip.get_tokenizer(spec.name), spec=spec, constants=constants, device=device
    )


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).add(1).item()
    except Exception as error:  # torch raises nearly anything, at any length
        cuda = [f"cuda:{place}" for place in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise BackboneError(
            f"nothing can be computed on device {device!r} ({shorten(str(error), 120)}): use one"
            f" that is here, {', '.join(['cpu', *cuda, *mps])}"
        ) from error


def _cut(pixels_B3HW: torch.Tensor, tiles: int) -> torch.Tensor:
    """Each image's tiles, row by row: `(B * tiles ** 2, 3, H / tiles, W / tiles)`."""
    height, width = pixels_B3HW.shape[-2] // tiles, pixels_B3HW.shape[-1] // tiles
    cut = pixels_B3HW.unflatten(-1, (tiles, width)).unflatten(-3, (tiles, height))
    tiles_X3hw: torch.Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return tiles_X3hw


def resize_position_embedding(position_SD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate `[CLS, patches]` embeddings of a square grid to another, as open_clip does."""
    cls_1D, patches_ND = position_SD[:1], position_SD[1:]
    side = round(len(patches_ND) ** 0.5)
    if (side, side) == grid:
        return position_SD
    square_1Dhw = patches_ND.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized_1Dhw = F.interpolate(
        square_1Dhw, size=grid, mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([cls_1D, resized_1Dhw.flatten(2)[0].T])


def _create_model(open_clip: Any, spec: BackboneSpec) -> CLIP:
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise BackboneError(
            f"open_clip has no architecture {spec.name!r}: use 'builtin' or one of the CLIP ViTs"
            f" that `python -c 'import open_clip; print(open_clip.list_models())'` lists"
        )
    reason = _why_unsupported(config)
    if reason:
        raise BackboneError(
            f"{spec.name} cannot be used: {reason}. Use a CLIP ViT with open_clip's own towers,"
            f" such as ViT-B-16, ViT-B-16-plus-240 or ViT-L-14-336"
        )
    if spec.pretrained is None:
        raise BackboneError(
            f"{spec.name} without weights is of no use: name a pretrained tag"
            f" ({', '.join(open_clip.list_pretrained_tags_by_model(spec.name)[:4])}, ...) or the"
            f" path of a checkpoint file"
        )
    is_file = Path(spec.pretrained).is_file()
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if not is_file and spec.pretrained not in tags:
        raise BackboneError(
            f"{spec.pretrained!r} is neither a file nor a pretrained tag of {spec.name}: the tags"
            f" are {', '.join(tags)}"
        )
    if is_file and spec.quick_gelu is None:
        raise BackboneError(
            f"{spec.pretrained} does not say which activation it was trained with: set quick_gelu"
            f" to true for OpenAI's weights and those derived from them, to false otherwise"
        )
    level = logging.getLogger().level
    try:
        return open_clip.create_model(
            spec.name, pretrained=spec.pretrained, force_quick_gelu=bool(spec.quick_gelu)
        )
    except Exception as error:  # open_clip, torch and the hub raise many kinds
        raise BackboneError(
            f"cannot load {spec.pretrained} into {spec.name} ({error}): check that the file belongs"
            f" to this architecture, or that the hub can be reached"
        ) from error
    finally:
        logging.getLogger().setLevel(level)


def _why_unsupported(config: dict[str, Any]) -> str | None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if config.get("custom_text") or "hf_model_name" in text or "hf_tokenizer_name" in text:
        return "its text tower is not CLIP's own"
    if text.get("no_causal_mask") or text.get("embed_cls"):
        return "its text tower is not causal"
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        return "its vision tower is not a ViT of open_clip"
    if vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        return "its vision tower does not pool by a CLS token"
    return None


def _fingerprint(
    model: CLIP,
    spec: BackboneSpec,
    constants: BackboneConstants,
    input_size: int,
    reference: ReferenceEncoder | None,
) -> str:
    visual = model.visual
    description = {
        "activation": str(model.transformer.resblocks[0].mlp.gelu),
        "mean": [float(value) for value in visual.image_mean],
        "std": [float(value) for value in visual.image_std],
        "input_size": input_size,
        "tiles": spec.tiles,
        "attention": spec.model_dump(include={"attention", "locality_radius", "locality_blocks"}),
        "constants": constants.model_dump(),
        **spec.model_dump(include={"precision"}, exclude_defaults=True),
        **({"reference": reference.fingerprint} if reference else {}),
    }
    return fingerprint(description, model)
