"""What the rest of apt-ray may ask of a frozen encoder, whichever model it is.

Memory, masks, banks and prompts are written against these protocols, so a new model is one module,
and a fake with known features serves tests.

B images, N patch tokens, E joint width, M places of a reference layer, D its width, C token width,
L context length, T texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from apt_ray.config import BackboneSpec
from apt_ray.features.constants import BackboneConstants


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFeatures:
    """What a frozen encoder says of B images, float32 on its device.

    Attributes:
        tokens_BNE: patch tokens in the joint space, L2-normalised, row by row from the top left.
        cls_BE: the whole image in the joint space, L2-normalised.
        layers: reference layer -> `(B, M_l, D_l)` features of its places, row by row, a square grid
            each. Of unit length where directions are to be compared.
    """

    tokens_BNE: torch.Tensor
    cls_BE: torch.Tensor
    layers: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens_BNE)

    def __getitem__(self, index: slice | list[int]) -> ImageFeatures:
        return ImageFeatures(
            tokens_BNE=self.tokens_BNE[index],
            cls_BE=self.cls_BE[index],
            layers={layer: tokens[index] for layer, tokens in self.layers.items()},
        )

    @property
    def whole_BW(self) -> torch.Tensor:
        """Whole images: the means over the places of each layer, each of unit length, side by side,
        float32. A single defect hardly changes them, another camera or light does."""
        means = (self.layers[layer].float().mean(1) for layer in sorted(self.layers))
        return torch.cat([torch.nn.functional.normalize(mean, dim=-1) for mean in means], dim=-1)

    def to(self, device: torch.device) -> ImageFeatures:
        """The same features on another device."""
        return ImageFeatures(
            tokens_BNE=self.tokens_BNE.to(device),
            cls_BE=self.cls_BE.to(device),
            layers={layer: tokens.to(device) for layer, tokens in self.layers.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of all parts, in order."""
        return ImageFeatures(
            tokens_BNE=torch.cat([part.tokens_BNE for part in parts]),
            cls_BE=torch.cat([part.cls_BE for part in parts]),
            layers={
                layer: torch.cat([part.layers[layer] for part in parts])
                for layer in parts[0].layers
            },
        )


class ImageEncoder(Protocol):
    """Images to features. It never changes, and neither do the features of an image."""

    def __hash__(self) -> int:
        """By identity: what is derived from an encoder is kept with it."""

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its features are."""

    @property
    def input_size(self) -> int:
        """Pixels a side of the square that an image is resized to."""

    @property
    def prompt_size(self) -> int:
        """Pixels a side at which patch tokens are made: `input_size`, or less."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in that square; N is their product."""

    @property
    def reference_grid(self) -> tuple[int, int]:
        """(rows, columns) of the places of the first reference layer, the finest."""

    @property
    def fingerprint(self) -> str:
        """Hex digest over the weights and everything else that shapes the features."""

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images of any size -> pixels `(B, 3, input_size, input_size)`, float32 in 0..1."""

    def encode_images(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        """Features of preprocessed pixels, on any device, in one forward pass."""

    def encode_in_batches(self, pixels_B3HW: torch.Tensor) -> ImageFeatures:
        """`encode_images` of any number of images, in passes of bounded memory."""

    def encode_tokens(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """The patch tokens alone, `(B, N, E)`, of pixels of `prompt_size`, in such passes."""

    def encode_places(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)`, L2-normalised, of pixels of `prompt_size`: patches in a shallow layer, where
        each still speaks of its own place."""


class ReferenceEncoder(Protocol):
    """Images to what the reference memory compares. It never changes."""

    @property
    def input_size(self) -> int:
        """Pixels a side of the square that it sees."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the places of its first layer, the finest."""

    @property
    def fingerprint(self) -> str:
        """Hex digest over the weights and everything else that shapes the features."""

    def encode(self, pixels_B3HW: torch.Tensor) -> dict[int, torch.Tensor]:
        """Pixels in 0..1 of `input_size` -> reference layers, as `ImageFeatures` has them."""


class TextEncoder(Protocol):
    """Prompt contexts and written texts to features in the joint space of an `ImageEncoder`."""

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its features are."""

    @property
    def token_width(self) -> int:
        """C, the width of a context's vectors."""

    @property
    def token_std(self) -> float:
        """Standard deviation of the token embeddings, the scale of random contexts."""

    @property
    def max_context_length(self) -> int:
        """The most vectors that a context may have."""

    def encode_contexts(self, contexts_TLC: torch.Tensor, lengths_T: torch.Tensor) -> torch.Tensor:
        """Prompt contexts -> text features `(T, E)`, float32, L2-normalised, differentiable.

        What stands behind a context's own length is ignored.
        """

    def embed_words(self, text: str) -> torch.Tensor:
        """Written words -> their token embeddings `(L, C)`, float32, as a context has them."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Written texts -> text features `(T, E)`, float32, L2-normalised."""


class Backbone(ImageEncoder, TextEncoder, Protocol):
    """A vision-language model as the method needs it: both encoders, and what is known of them."""

    @property
    def spec(self) -> BackboneSpec:
        """What it was loaded from."""

    @property
    def constants(self) -> BackboneConstants:
        """How its similarities become probabilities."""

    def drop_vision(self) -> None:
        """Free what encodes images, in a process that only trains prompts.

        From then on images cannot be encoded.
        """
