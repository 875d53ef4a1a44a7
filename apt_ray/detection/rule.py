"""From text features and patch tokens to probabilities, anomaly maps and scores.

Training and inspection score with these same functions. B images (or any leading dimensions), N
patch tokens, E joint width, P prompts: row 0 the normal one, the others anomalous.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from apt_ray.features.constants import BackboneConstants

TOP_SHARE = 0.01
"""The anomaly score is the mean of this share of the highest values."""

_SMOOTHING = 4 / 240
"""Standard deviation of the map's Gaussian, as a fraction of its side."""


def prompt_log_probabilities(
    tokens_NE: torch.Tensor, text_PE: torch.Tensor, constants: BackboneConstants
) -> torch.Tensor:
    """Log-softmax over the prompts for each token, `(..., N, P)`; leading dimensions broadcast."""
    # The tokens' product in this order reads them as they lie.
    return cosine_log_probabilities(text_PE @ tokens_NE.mT, constants)


def cosine_log_probabilities(cosine_PN: torch.Tensor, constants: BackboneConstants) -> torch.Tensor:
    """Cosines of prompts and tokens `(..., P, N)` -> `prompt_log_probabilities` `(..., N, P)`."""
    bias_P1 = torch.full((cosine_PN.shape[-2], 1), constants.dense_bias, device=cosine_PN.device)
    bias_P1[0] = 0
    return F.log_softmax(constants.dense_scale * cosine_PN + bias_P1, dim=-2).mT


def anomalous_probability(
    tokens_NE: torch.Tensor, text_PE: torch.Tensor, constants: BackboneConstants
) -> torch.Tensor:
    """p_prompt `(..., N)` in 0..1: the anomalous prompts' probabilities, summed."""
    return prompt_log_probabilities(tokens_NE, text_PE, constants)[..., 1:].exp().sum(-1)


def reference_probability(distance: torch.Tensor, constants: BackboneConstants) -> torch.Tensor:
    """p_ref in 0..1 of a cosine distance to the support set."""
    return torch.sigmoid(constants.reference_scale * distance + constants.reference_bias)


def fuse(p_prompt: torch.Tensor, p_ref: torch.Tensor, reference_weight: float) -> torch.Tensor:
    """Weighted harmonic mean in float32; weight 0 is `p_prompt` itself, 1 is `p_ref`."""
    if reference_weight == 0:
        return p_prompt
    if reference_weight == 1:
        return p_ref
    smallest = torch.finfo(torch.float32).tiny
    return 1 / (
        (1 - reference_weight) / p_prompt.float().clamp_min(smallest)
        + reference_weight / p_ref.float().clamp_min(smallest)
    )


def top_mean(values_BX: torch.Tensor) -> torch.Tensor:
    """Mean of the highest 1 % along the last dimension, of one value at the least."""
    count = max(1, round(TOP_SHARE * values_BX.shape[-1]))
    return values_BX.topk(count, dim=-1).values.mean(-1)


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
    return vertical_HR @ p_BN.reshape(-1, rows, columns) @ horizontal_WC.T


def resize_map(map_HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map brought to `size` = (width, height) of the image, bilinear."""
    width, height = size
    return F.interpolate(
        map_HW[None, None], size=(height, width), mode="bilinear", align_corners=False
    )[0, 0]


def auroc(scores_BX: torch.Tensor, labels_BX: torch.Tensor) -> torch.Tensor:
    """AUROC along the last dimension for many rows at once, ties counted half.

    Labels are 1 anomalous, 0 normal, anything else ignored; rows broadcast. NaN where a row lacks
    one of the two. Used to judge trials; reports use `apt_ray.validation.metrics`.
    """
    scores_BX, labels_BX = torch.broadcast_tensors(scores_BX, labels_BX)
    known_BX = (labels_BX == 0) | (labels_BX == 1)
    order_BX = torch.where(known_BX, scores_BX, torch.inf).argsort(-1)
    sorted_BX = scores_BX.gather(-1, order_BX).double()
    is_normal_BX = (labels_BX == 0).gather(-1, order_BX).double()
    is_anomalous_BX = (labels_BX == 1).gather(-1, order_BX).double()
    # Ties share the mean rank of their run: average what lies below the run's two ends.
    changes_BX = F.pad(sorted_BX[..., 1:] != sorted_BX[..., :-1], (1, 0), value=True)
    run_BX = changes_BX.long().cumsum(-1) - 1
    per_run_BX = torch.zeros_like(sorted_BX).scatter_add_(-1, run_BX, is_normal_BX)
    below_BX = (per_run_BX.cumsum(-1) - 0.5 * per_run_BX).gather(-1, run_BX)
    wins_B = (below_BX * is_anomalous_BX).sum(-1)
    return wins_B / (is_normal_BX.sum(-1) * is_anomalous_BX.sum(-1))
