"""The score rule: from an image's features to its anomaly map and its anomaly score.

Fits, trials, evaluation, comparisons of versions, replicas, pyfunc and benchmarks all score by
`ScoreRule`. A prompt set carries `RULE_VERSION`, since its threshold means something under the rule
that set it alone.

B images (or any leading dimensions), N patch tokens, M_l places of reference layer l, E joint
width, P prompts: row 0 the normal one, the others anomalous; S pixels a side of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from apt_ray.config import FitSettings, Settings
from apt_ray.features.constants import BackboneConstants
from apt_ray.features.protocol import Backbone, ImageFeatures

if TYPE_CHECKING:
    from apt_ray.detection.reference import ReferenceMemory

RULE_VERSION = 2
"""Raised whenever the same features come to another map or score."""

TOP_SHARE = 0.005
"""The anomaly score is a mean over this share of the map, its highest values, as in AnomalyDINO
(arXiv 2405.14529), which takes 1 %."""

MOST_EVIDENCE = 5.0
"""Standard deviations above which more evidence of one kind counts no more: what one layer finds
odd may be a harmless novelty, what several find odd seldom is."""

_SMOOTHING = 4 / 240
"""Standard deviation of the map's Gaussian, as a fraction of its side: the 4 pixels at 240 of
PromptAD's code (arXiv 2404.05231)."""

_SMALLEST_SD_OF_ODDS = 0.5  # real support images show 0.8 to 2.6, plain ones nothing

_WORST_PATCHES = 0.01  # of the patches that losses and trials look at


class Scale(Settings):
    """What evidence of one kind is measured in: its mean and deviation at normal places."""

    mean: float = Field(allow_inf_nan=False)
    sd: float = Field(gt=0, allow_inf_nan=False)

    @classmethod
    def of(cls, evidence: torch.Tensor, *, smallest: float) -> Scale:
        """The scale of evidence at normal places, of any shape.

        Args:
            smallest: deviation that is believed: places of a plain image are alike to the last bit,
                those of the next one are not.
        """
        return cls(mean=float(evidence.mean()), sd=max(float(evidence.std()), smallest))

    @classmethod
    def of_odds(cls, odds: torch.Tensor) -> Scale:
        """The scale of log-odds at the patches of normal images."""
        return cls.of(odds, smallest=_SMALLEST_SD_OF_ODDS)

    def excess(self, evidence: torch.Tensor) -> torch.Tensor:
        """The square of what is above the mean, 0..1, and 1 from `MOST_EVIDENCE` deviations on."""
        return ((evidence - self.mean) / (MOST_EVIDENCE * self.sd)).clamp(0, 1).square()


class Scales(Settings):
    """Those of a prompt set: what its own support images say is ordinary."""

    prompts: Scale = Field(description="Of the prompts' log-odds.")
    layers: dict[int, Scale] = Field(description="Reference layer -> of its distances.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRule:
    """The rule as one backbone and one setting have it.

    Attributes:
        constants: how similarities become probabilities.
        grid: (rows, columns) of patches.
        map_size: S.
        reference_weight: 0 is the prompts alone, 1 the reference memory alone.
        cls_weight: share of the whole image's prompt score in the anomaly score.
    """

    constants: BackboneConstants
    grid: tuple[int, int]
    map_size: int
    reference_weight: float
    cls_weight: float

    @classmethod
    def of(cls, backbone: Backbone, settings: FitSettings) -> ScoreRule:
        """The rule for what `settings` fit on `backbone`."""
        return cls(
            constants=backbone.constants,
            grid=backbone.grid,
            map_size=backbone.prompt_size,
            reference_weight=settings.reference_weight,
            cls_weight=settings.cls_weight,
        )

    def score(
        self,
        features: ImageFeatures,
        text_PE: torch.Tensor,
        memory: ReferenceMemory,
        scales: Scales,
        *,
        interest_SS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anomaly maps `(B, S, S)` and anomaly scores `(B,)`, both float32 in 0..1.

        The maps are 0 outside of `interest_SS`, where it is given. The score is taken over the same
        number of pixels with it as without: it can only become lower, so whatever a threshold
        promises about good parts still holds.
        """
        odds_BN = anomalous_log_odds(features.tokens_BNE, text_PE, self.constants)
        maps_BSS, scores_B = self.score_evidence(
            odds_BN, memory.distances(features), scales, interest_SS=interest_SS
        )
        if self.cls_weight == 0:
            return maps_BSS, scores_B
        p_cls_B = anomalous_probability(features.cls_BE, text_PE, self.constants)
        return maps_BSS, (1 - self.cls_weight) * scores_B + self.cls_weight * p_cls_B

    def score_evidence(
        self,
        odds_BN: torch.Tensor,
        distances: dict[int, torch.Tensor],
        scales: Scales,
        *,
        interest_SS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps and scores from log-odds of patches and distances of places, `(B, M_l)` a layer.

        What is above the ordinary is squared and averaged, so that a map is a root mean square of
        deviations, 1 being `MOST_EVIDENCE` of every kind.
        """
        prompts_BF, layers_LBF = self.excesses(odds_BN, distances, scales)
        weight = self.reference_weight
        fused_BF = (1 - weight) * prompts_BF + weight * layers_LBF.mean(0)
        maps_BSS, scores_B = self._score(fused_BF, self._finest(distances), interest_SS)
        return maps_BSS.sqrt(), scores_B.sqrt()

    def excesses(
        self, odds_BN: torch.Tensor, distances: dict[int, torch.Tensor], scales: Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is above the ordinary, squared, at the places of the finest grid: of the prompts
        `(B, F)`, and of each layer `(L, B, F)`; 0..1.

        Each kind of evidence is measured in standard deviations of its own.
        """
        finest = self._finest(distances)
        layers = [
            enlarge(scales.layers[layer].excess(distance), _square(distance.shape[1]), finest)
            for layer, distance in distances.items()
        ]
        prompts_BF = enlarge(scales.prompts.excess(odds_BN), self.grid, finest)
        return prompts_BF, torch.stack(layers)

    def highest_score(self, interest_SS: torch.Tensor) -> float:
        """The score of a map that is 1 all over `interest_SS`: less than 1 if that is too small for
        the pixels that a score is taken over."""
        return float(self._top(interest_SS[None])[0].sqrt())

    def score_patches(self, p_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps and scores from one value in 0..1 of each patch, wherever that comes from."""
        return self._score(p_BN, _square(p_BN.shape[1]), None)

    def _finest(self, distances: dict[int, torch.Tensor]) -> tuple[int, int]:
        return max(self.grid, *(_square(distance.shape[1]) for distance in distances.values()))

    def _score(
        self, p_BF: torch.Tensor, grid: tuple[int, int], interest_SS: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        maps_BSS = anomaly_maps(p_BF, grid, self.map_size)
        if interest_SS is not None:
            maps_BSS = maps_BSS * interest_SS
        return maps_BSS, self._top(maps_BSS)

    def _top(self, maps_BSS: torch.Tensor) -> torch.Tensor:
        return top_mean(maps_BSS.flatten(1), max(1, round(TOP_SHARE * self.map_size**2)))


def _square(places: int) -> tuple[int, int]:
    """The grid of that many places: images are resized to squares."""
    return isqrt(places), isqrt(places)


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


def anomalous_log_odds(
    tokens_NE: torch.Tensor, text_PE: torch.Tensor, constants: BackboneConstants
) -> torch.Tensor:
    """log(p_prompt / (1 - p_prompt)), `(..., N)`: of the anomalous prompts against the normal."""
    log_NP = prompt_log_probabilities(tokens_NE, text_PE, constants)
    return log_NP[..., 1:].logsumexp(-1) - log_NP[..., 0]


def top_mean(values_BX: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Mean of the `count` highest values along the last dimension; by default of the highest 1 %,
    of one value at the least."""
    count = count or worst_patches(values_BX.shape[-1])
    return values_BX.topk(count, dim=-1).values.mean(-1)


def worst_patches(patches: int) -> int:
    """How many of them losses and trials look at: the most anomalous 1 %, one at the least."""
    return max(1, round(_WORST_PATCHES * patches))


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
    """Patch values in 0..1 -> smooth maps `(B, size, size)` in 0..1, higher is worse."""
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
