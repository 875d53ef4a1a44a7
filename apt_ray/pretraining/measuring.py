"""Constants and figures from generated kinds of surface and defect that training never shows.

Shapes: P pairs, N patches, E joint width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.detection.rule import top_mean
from apt_ray.features.constants import BackboneConstants
from apt_ray.pretraining.captions import (
    ANOMALOUS_STATES,
    NORMAL_STATES,
    TEMPLATES,
    Vocabulary,
    state_phrase,
)
from apt_ray.pretraining.defects import HELD_OUT_DEFECTS
from apt_ray.pretraining.features import (
    REFERENCE_BLOCKS,
    encode_images,
    encode_texts,
    position_embedding,
)
from apt_ray.pretraining.generator import generate
from apt_ray.pretraining.losses import known_labels, participation_ratio, reference_distance
from apt_ray.pretraining.surfaces import HELD_OUT_SURFACES
from apt_ray.validation.metrics import image_auroc, pixel_auroc

if TYPE_CHECKING:
    from open_clip import CLIP

PRIOR = 0.2
"""Share of anomalous patches for which the constants are calibrated, far above the true one.

Where all probabilities of a picture are small, the highest alone decide its score; at a larger
prior its mean weighs a defect's extent too. 0.1 to 0.3 are alike on products of held-out kinds."""

_CHUNK = 32
_MIN_SCALE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Encoded pairs of held-out kinds: what the scores and the figures are made of."""

    mask_PHW: Tensor
    labels_PN: Tensor
    tokens_PNE: Tensor
    distances_PN: dict[int, Tensor]

    @property
    def known(self) -> Tensor:
        """(P, N) bool: patches with a clear label."""
        return ~self.labels_PN.isnan()


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Measured on held-out kinds; AUROC in 0..1."""

    pixel_auroc_prompts: float
    image_auroc_prompts: float
    pixel_auroc_reference: float
    image_auroc_reference: float
    pixel_auroc_by_block: dict[int, float]
    participation_ratio: float


@torch.inference_mode()
def encode_held_out(
    model: CLIP,
    *,
    pairs: int,
    seed: int,
    surfaces: Sequence[str] = tuple(HELD_OUT_SURFACES),
    defects: Sequence[str] = tuple(HELD_OUT_DEFECTS),
) -> HeldOut:
    """Generate pairs at the model's own size, half of them defective, and encode them."""
    visual = model.visual
    device = visual.conv1.weight.device
    size, blocks = visual.image_size[0], range(len(visual.transformer.resblocks))
    position_NW = position_embedding(model, visual.grid_size[0])
    parts: list[HeldOut] = []
    for seeds_P in (seed + torch.arange(pairs, device=device)).split(_CHUNK):
        batch = generate(seeds_P, size=size, surfaces=surfaces, defects=defects, defect_rate=0.5)
        reference = encode_images(model, batch.reference_P3HW, position_NW, blocks)
        query = encode_images(model, batch.query_P3HW, position_NW, blocks)
        distances = {
            block: reference_distance(
                [query.block_tokens_BNW[block]], [reference.block_tokens_BNW[block]]
            )
            for block in blocks
        }
        parts.append(
            HeldOut(
                mask_PHW=batch.mask_PHW,
                labels_PN=known_labels(batch.mask_PHW, visual.patch_size[0]),
                tokens_PNE=query.tokens_BNE,
                distances_PN=distances,
            )
        )
    return HeldOut(
        mask_PHW=torch.cat([part.mask_PHW for part in parts]),
        labels_PN=torch.cat([part.labels_PN for part in parts]),
        tokens_PNE=torch.cat([part.tokens_PNE for part in parts]),
        distances_PN={
            block: torch.cat([part.distances_PN[block] for part in parts]) for block in blocks
        },
    )


@torch.inference_mode()
def state_features(model: CLIP, vocabulary: Vocabulary) -> Tensor:
    """(2, E): the normalised mean text features of all normal and all anomalous state phrases."""
    device = model.visual.conv1.weight.device
    means = []
    for states in (NORMAL_STATES, ANOMALOUS_STATES):
        texts = [state_phrase(state, template) for state in states for template in TEMPLATES]
        tokens_KL = vocabulary.tokens(texts).to(device)
        features_KE = encode_texts(model, model.token_embedding(tokens_KL), tokens_KL.argmax(1))
        means.append(F.normalize(features_KE.mean(0), dim=0))
    return torch.stack(means)


def fit_constants(held_out: HeldOut, states_2E: Tensor) -> BackboneConstants:
    """Scales and biases of the prompts and of the reference, calibrated for a `PRIOR`.

    The layers of the reference are those trained for it, all of them: held-out kinds rank single
    blocks within their noise, and an average over depths suits more products than the best one.
    """
    contrast_PN = held_out.tokens_PNE @ (states_2E[1] - states_2E[0])
    dense_scale, dense_bias = _logistic(contrast_PN, held_out)
    reference_scale, reference_bias = _logistic(_distance(held_out, REFERENCE_BLOCKS), held_out)
    return BackboneConstants(
        dense_scale=dense_scale,
        dense_bias=dense_bias,
        reference_scale=reference_scale,
        reference_bias=reference_bias,
        reference_layers=REFERENCE_BLOCKS,
    )


def measure(held_out: HeldOut, states_2E: Tensor, constants: BackboneConstants) -> Figures:
    """The figures of the model card."""
    contrast_PN = held_out.tokens_PNE @ (states_2E[1] - states_2E[0])
    distance_PN = _distance(held_out, constants.reference_layers)
    return Figures(
        pixel_auroc_prompts=_pixel_auroc(contrast_PN, held_out.mask_PHW),
        image_auroc_prompts=_image_auroc(contrast_PN, held_out.mask_PHW),
        pixel_auroc_reference=_pixel_auroc(distance_PN, held_out.mask_PHW),
        image_auroc_reference=_image_auroc(distance_PN, held_out.mask_PHW),
        pixel_auroc_by_block={
            block: _pixel_auroc(distance, held_out.mask_PHW)
            for block, distance in held_out.distances_PN.items()
        },
        participation_ratio=participation_ratio(held_out.tokens_PNE.flatten(0, 1)).item(),
    )


def _distance(held_out: HeldOut, layers: Sequence[int]) -> Tensor:
    return torch.stack([held_out.distances_PN[layer] for layer in layers]).mean(0)


def _logistic(score_PN: Tensor, held_out: HeldOut) -> tuple[float, float]:
    """Scale (positive) and bias of the logistic regression of the patch labels on a score, moved
    from the labels' own share of anomalous patches to `PRIOR`."""
    score = score_PN[held_out.known].double()
    target = held_out.labels_PN[held_out.known].double()
    centre, spread = score.mean(), score.std()
    parameters = torch.zeros(2, dtype=torch.float64, device=score.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = parameters[0] * (score - centre) / spread + parameters[1]
        loss = F.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    slope, intercept = parameters.detach().tolist()
    scale = max(slope / spread.item(), _MIN_SCALE)
    share = target.mean().item()
    move = math.log(PRIOR / (1 - PRIOR)) - math.log(share / (1 - share))
    return scale, intercept - scale * centre.item() + move


def _pixel_auroc(score_PN: Tensor, mask_PHW: Tensor) -> float:
    side = int(score_PN.shape[1] ** 0.5)
    maps_PHW = F.interpolate(
        score_PN.unflatten(1, (1, side, side)), mask_PHW.shape[1:], mode="bilinear"
    )
    return pixel_auroc(list(maps_PHW[:, 0].cpu().numpy()), list(mask_PHW.cpu().numpy()))


def _image_auroc(score_PN: Tensor, mask_PHW: Tensor) -> float:
    score_P = top_mean(score_PN, count=max(1, score_PN.shape[1] // 100))
    return image_auroc(score_P.cpu().numpy(), mask_PHW.flatten(1).any(1).cpu().numpy())
