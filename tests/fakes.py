"""Stand-ins whose behaviour is known: encoders without weights, and specs of banks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from apt_ray.anomalies.spec import BankSpec, JudgeSpec
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.features.constants import BackboneConstants
from apt_ray.features.pixels import to_pixels
from apt_ray.features.protocol import ImageEncoder, ImageFeatures

_WORDS = ("a", "an", "normal", "anomalous", "defect", "damage", "part", "surface")


class FakeBackbone:
    """Fulfils `features.protocol.Backbone`: a patch's token is its mean colour and its darkness.

    `tokens_BNE` and the one reference layer, 0, are the L2-normalised `(red, green, blue, 1)` of
    each patch. A text feature is the L2-normalised mean of its context's vectors; words are one-hot
    among a few, so texts that share words are alike.
    """

    def __init__(self, *, patches: int = 4, patch: int = 4, fingerprint: str = "fake") -> None:
        self.spec = BackboneSpec(name="fake")
        self.constants = BackboneConstants(
            dense_scale=10.0,
            dense_bias=0.0,
            reference_scale=20.0,
            reference_bias=-5.0,
            reference_layers=(0,),
        )
        self.device = torch.device("cpu")
        self.grid = self.reference_grid = (patches, patches)
        self.input_size = self.prompt_size = patches * patch
        self.fingerprint = fingerprint
        self.token_width = 4
        self.token_std = 0.5
        self.max_context_length = 16

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return to_pixels(images, self.input_size)

    def encode_images(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        colour_B3hw = F.adaptive_avg_pool2d(pixels_B3HW, self.grid)
        ones_B1hw = torch.ones_like(colour_B3hw[:, :1])
        raw_BN4 = torch.cat([colour_B3hw, ones_B1hw], 1).flatten(2).mT
        tokens_BN4 = F.normalize(raw_BN4, dim=-1)
        return ImageFeatures(
            tokens_BNE=tokens_BN4,
            cls_BE=F.normalize(raw_BN4.mean(1), dim=-1),
            layers={0: tokens_BN4},
        )

    def drop_vision(self) -> None:
        """There is nothing to free."""

    def encode_tokens(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.encode_images(pixels_B3HW).tokens_BNE

    def encode_places(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.encode_tokens(pixels_B3HW)

    def encode_in_batches(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        return self.encode_images(pixels_B3HW)

    def encode_contexts(self, contexts_TLC: torch.Tensor, lengths_T: torch.Tensor) -> torch.Tensor:
        inside_TL = torch.arange(contexts_TLC.shape[1]) < lengths_T[:, None]
        mean_TC = (contexts_TLC * inside_TL[..., None]).sum(1) / lengths_T[:, None]
        return F.normalize(mean_TC, dim=-1)

    def embed_words(self, text: str) -> torch.Tensor:
        ids_L = torch.tensor([_WORDS.index(w) if w in _WORDS else len(w) for w in text.split()])
        return F.one_hot(ids_L % self.token_width, self.token_width).float()

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([F.normalize(self.embed_words(text).mean(0), dim=-1) for text in texts])


def bank_spec(encoder: ImageEncoder, images: int, **fields: Any) -> BankSpec:
    """The spec of a bank of so many images that lie in no file."""
    known = {"seed": 0, "support": [f"image {place}" for place in range(images)]}
    return BankSpec.parse({"fingerprint": encoder.fingerprint, **known, **fields})


def judge_spec(encoder: ImageEncoder, images: int, **fields: Any) -> JudgeSpec:
    """The spec of the judge of the trials that learn from such a bank."""
    spec = bank_spec(encoder, images)
    settings = FitSettings.parse({"reference_rotations": 1, **fields})
    return JudgeSpec.of(settings, spec.support, fingerprint=spec.fingerprint, seed=spec.seed)
