"""The score rule: from an image's features to its anomaly map and its anomaly score.

Fits, evaluation, comparisons of versions, replicas, pyfunc and benchmarks all score by `ScoreRule`;
trials are judged by its parts, on the patches of the prompts alone (`validation.synthetic`). A
prompt set carries `RULE_VERSION`, since its threshold means something under the rule that set it
alone.

B images (or any leading dimensions), N patch tokens, E joint width, P prompts: row 0 the normal
one, the others anomalous; S pixels a side of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from apt_ray.config import FitSettings
from apt_ray.features.constants import BackboneConstants
from apt_ray.features.protocol import Backbone, ImageFeatures

if TYPE_CHECKING:
    from apt_ray.detection.reference import DistanceScale, ReferenceMemory

RULE_VERSION = 1
"""Raised whenever the same features come to another map or score."""

TOP_SHARE = 0.01
"""The anomaly score is the mean of this share of the highest values, as in AnomalyDINO (arXiv
2405.14529)."""

_EVEN_ODDS = 4.0

_SMOOTHING = 4 / 240
"""Standard deviation of the map's Gaussian, as a fraction of its side: the 4 pixels at 240 of
PromptAD's code (arXiv 2404.05231)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRule:
    """The rule as one backbone and one setting have it.

    Attributes:
        constants: how similarities become probabilities.
        grid: (rows, columns) of patches.
        reference_grid: (rows, columns) of the places that the memory compares.
        map_size: S.
        reference_weight: 0 is the prompts alone, 1 the reference memory alone.
        cls_weight: share of the whole image's prompt score in the anomaly score.
    """

    constants: BackboneConstants
    grid: tuple[int, int]
    reference_grid: tuple[int, int]
    map_size: int
    reference_weight: float
    cls_weight: float

    @classmethod
    def of(cls, backbone: Backbone, settings: FitSettings) -> ScoreRule:
        """The rule for what `settings` fit on `backbone`."""
        return cls(
            constants=backbone.constants,
            grid=backbone.grid,
            reference_grid=backbone.reference_grid,
            map_size=backbone.input_size,
            reference_weight=settings.reference_weight,
            cls_weight=settings.cls_weight,
        )

    def score(
        self,
        features: ImageFeatures,
        text_PE: torch.Tensor,
        memory: ReferenceMemory,
        *,
        interest_SS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anomaly maps `(B, S, S)` and anomaly scores `(B,)`, both float32 in 0..1.

        The maps are 0 outside of `interest_SS`, where it is given. The score is the mean over the
        same number of pixels with it as without: it can only become lower, so whatever a threshold
        promises about good parts still holds.
        """
        p_prompt_BN = anomalous_probability(features.tokens_BNE, text_PE, self.constants)
        p_ref_BM = reference_probability(memory.distance(features), self.constants, memory.scale)
        finer = max(self.grid, self.reference_grid)
        p_BF = fuse(
            enlarge(p_prompt_BN, self.grid, finer),
            enlarge(p_ref_BM, self.reference_grid, finer),
            self.reference_weight,
        )
        maps_BSS, scores_B = self._score(p_BF, finer, interest_SS)
        p_cls_B = anomalous_probability(features.cls_BE, text_PE, self.constants)
        return maps_BSS, (1 - self.cls_weight) * scores_B + self.cls_weight * p_cls_B

    def score_patches(
        self, p_BN: torch.Tensor, *, interest_SS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps and scores from the probability of each patch, wherever that comes from."""
        return self._score(p_BN, self.grid, interest_SS)

    def _score(
        self, p_BF: torch.Tensor, grid: tuple[int, int], interest_SS: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        maps_BSS = anomaly_maps(p_BF, grid, self.map_size)
        if interest_SS is not None:
            maps_BSS = maps_BSS * interest_SS
        return maps_BSS, top_mean(maps_BSS.flatten(1))


def cosine_log_probabilities(cosine_PN: torch.Tensor, constants: BackboneConstants) -> torch.Tensor:
    """Cosines of prompts and tokens `(..., P, N)` -> log-softmax over the prompts `(..., N, P)`."""
    bias_P1 = torch.full((cosine_PN.shape[-2], 1), constants.dense_bias, device=cosine_PN.device)
    bias_P1[0] = 0
    return F.log_softmax(constants.dense_scale * cosine_PN + bias_P1, dim=-2).mT


def prompt_log_probabilities(
    tokens_NE: torch.Tensor, text_PE: torch.Tensor, constants: BackboneConstants
) -> torch.Tensor:
    """Log-softmax over the prompts for each token, `(..., N, P)`; leading dimensions broadcast."""
    # The tokens' product in this order reads them as they lie.
    return cosine_log_probabilities(text_PE @ tokens_NE.mT, constants)


def anomalous_probability(
    tokens_NE: torch.Tensor, text_PE: torch.Tensor, constants: BackboneConstants
) -> torch.Tensor:
    """p_prompt `(..., N)` in 0..1: the anomalous prompts' probabilities, summed."""
    return prompt_log_probabilities(tokens_NE, text_PE, constants)[..., 1:].exp().sum(-1)


def reference_probability(
    distance: torch.Tensor, constants: BackboneConstants, scale: DistanceScale | None = None
) -> torch.Tensor:
    """p_ref in 0..1 of a cosine distance to the support set: a sigmoid of it.

    Scale and bias are the backbone's constants, or those of a category: then `_EVEN_ODDS` standard
    deviations above the mean distance of normal places come to one half.
    """
    if scale is not None:
        return torch.sigmoid((distance - scale.mean) / scale.sd - _EVEN_ODDS)
    return torch.sigmoid(constants.reference_scale * distance + constants.reference_bias)


def fuse(p_prompt: torch.Tensor, p_ref: torch.Tensor, reference_weight: float) -> torch.Tensor:
    """Weighted harmonic mean in float32; weight 0 is `p_prompt` itself, 1 is `p_ref`.

    PromptAD (arXiv 2404.05231) fuses its two maps so, with equal weights and without the factor 2.
    """
    if reference_weight == 0:
        return p_prompt
    if reference_weight == 1:
        return p_ref
    smallest = torch.finfo(torch.float32).tiny
    return 1 / (
        (1 - reference_weight) / p_prompt.float().clamp_min(smallest)
        + reference_weight / p_ref.float().clamp_min(smallest)
    )


def top_mean(values_BX: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Mean of the `count` highest values along the last dimension; by default of the highest 1 %,
    of one value at the least."""
    if count is None:
        count = max(1, round(TOP_SHARE * values_BX.shape[-1]))
    return values_BX.topk(count, dim=-1).values.mean(-1)


def enlarge(p_BN: torch.Tensor, grid: tuple[int, int], finer: tuple[int, int]) -> torch.Tensor:
    """Values of a grid's places at those of a finer grid, `(B, F)`, bilinear."""
    if grid == finer:
        return p_BN
    return F.interpolate(
        p_BN.unflatten(1, (1, *grid)), size=finer, mode="bilinear", align_corners=False
    ).flatten(1)


@lru_cache(maxsize=8)
def _upsampling(patches: int, size: int) -> torch.Tensor:
    """One axis of bilinear enlarging and Gaussian smoothing as a matrix `(size, patches)`."""
    bilinear = F.interpolate(
        torch.eye(patches)[None], size=size, mode="linear", align_corners=False
    )[0].T
    place = torch.arange(size, dtype=torch.float32)
    sigma = _SMOOTHING * size
    gaussian = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return (gaussian / gaussian.sum(1, keepdim=True)) @ bilinear


def anomaly_maps(p_BN: torch.Tensor, grid: tuple[int, int], size: int) -> torch.Tensor:
    """Patch probabilities -> smooth maps `(B, size, size)` in 0..1, higher is worse."""
    rows, columns = grid
    vertical_HR = _upsampling(rows, size).to(p_BN.device)
    horizontal_WC = _upsampling(columns, size).to(p_BN.device)
    maps_BHW = vertical_HR @ p_BN.reshape(-1, rows, columns) @ horizontal_WC.T
    return maps_BHW.clamp(0, 1)  # weights that add up to 1 but for rounding


def resize_map(map_HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map brought to `size` = (width, height) of the image, bilinear."""
    width, height = size
    return F.interpolate(
        map_HW[None, None], size=(height, width), mode="bilinear", align_corners=False
    )[0, 0]
