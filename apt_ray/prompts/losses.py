"""The losses of prompts on self-generated anomalies, one value a lane, and their gradients.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

import torch
import torch.nn.functional as F

from apt_ray.detection.rule import cosine_log_probabilities, top_mean
from apt_ray.features.constants import BackboneConstants

_FOCAL_GAMMA = 2


_SMALLEST_SQUARE = 1e-12


def gradients_at_text(
    tokens_TBNE: torch.Tensor,
    labels_TBN: torch.Tensor,
    text_TPE: torch.Tensor,
    meta_T2E: torch.Tensor | None,
    constants: BackboneConstants,
) -> tuple[torch.Tensor, ...]:
    """Gradients `(T, P, E)` to the text features: of `synthetic_loss`, and with a meta-prompt of
    the `divergence` from it.

    Each lane's loss depends on its own text features alone, so the gradient of the sum over lanes
    holds every lane's own gradient. The tokens, by far the largest tensor, are read once for all
    cosines and once for all gradients.
    """
    prompts, tokens_TXE = text_TPE.shape[1], tokens_TBNE.flatten(1, 2)
    known_TQE = text_TPE if meta_T2E is None else torch.cat([text_TPE, meta_T2E], dim=1)
    cosine_TQX = known_TQE @ tokens_TXE.mT
    learned_TPX = cosine_TQX[:, :prompts].requires_grad_(True)

    def by_image(cosine_TPX: torch.Tensor) -> torch.Tensor:
        log_p_TXP = cosine_log_probabilities(cosine_TPX, constants)
        return log_p_TXP.reshape(*tokens_TBNE.shape[:3], -1)

    log_p_TBNP = by_image(learned_TPX)
    losses = [synthetic_loss(log_p_TBNP, labels_TBN)]
    if meta_T2E is not None:
        losses.append(divergence(by_image(cosine_TQX[:, prompts:]), log_p_TBNP))
    at_cosine = [
        torch.autograd.grad(loss_T.sum(), learned_TPX, retain_graph=True)[0] for loss_T in losses
    ]
    return (torch.cat(at_cosine, dim=1) @ tokens_TXE).chunk(len(losses), dim=1)


def synthetic_loss(log_p_TBNP: torch.Tensor, labels_TBN: torch.Tensor) -> torch.Tensor:
    """The loss on self-generated anomalies, one value a lane.

    Patch level: focal loss (gamma 2; Lin et al., arXiv 1708.02002) plus Dice (Milletari et al.,
    arXiv 1606.04797), smoothed by 1, on the anomalous probability. Image level: cross-entropy of
    the mean over the most anomalous 1 % of the patches. Labels of -1 are ignored.
    """
    p_TBN = log_p_TBNP[..., 1:].exp().sum(-1).clamp(1e-6, 1 - 1e-6)
    known_TBN = labels_TBN >= 0
    is_anomalous_TBN = labels_TBN == 1
    p_true_TBN = torch.where(is_anomalous_TBN, p_TBN, 1 - p_TBN)
    focal_TBN = -((1 - p_true_TBN) ** _FOCAL_GAMMA) * p_true_TBN.log()
    focal_T = _mean(focal_TBN, known_TBN)
    covered_T = (p_TBN * is_anomalous_TBN).sum((1, 2))
    total_T = (p_TBN * known_TBN).sum((1, 2)) + is_anomalous_TBN.sum((1, 2))
    dice_T = 1 - (2 * covered_T + 1) / (total_T + 1)
    worst_TB = top_mean(p_TBN)
    has_anomaly_TB = is_anomalous_TBN.any(-1)
    # An image whose only region is too small for any patch says neither normal nor anomalous.
    is_known_TB = has_anomaly_TB | (labels_TBN == 0).all(-1)
    image_TB = -torch.where(has_anomaly_TB, worst_TB, 1 - worst_TB).log()
    return focal_T + dice_T + _mean(image_TB, is_known_TB)


def divergence(meta_TBN2: torch.Tensor, learned_TBNP: torch.Tensor) -> torch.Tensor:
    """KL(p_meta || p_learned) of log-probabilities, averaged over the patches, one value a lane.

    Between normal and anomalous, whichever of the anomalous prompts it is.
    """
    learned_TBN2 = torch.stack([learned_TBNP[..., 0], learned_TBNP[..., 1:].logsumexp(-1)], dim=-1)
    return (meta_TBN2.exp() * (meta_TBN2 - learned_TBN2)).sum(-1).mean((1, 2))


def likeness(text_TAE: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each two of a lane's prompts, one value a lane; features of unit length."""
    count = text_TAE.shape[1]
    cosine_TAA = text_TAE @ text_TAE.mT
    return (cosine_TAA.sum((1, 2)) - count) / (count * (count - 1))


def margin(
    tokens_TBNE: torch.Tensor, labels_TBN: torch.Tensor, text_TPE: torch.Tensor
) -> torch.Tensor:
    """How much farther good patches are from the normal prompt than from the middle of the
    anomalous ones, where they are; the explicit anomaly margin of PromptAD (arXiv 2404.05231), one
    value a lane."""
    anomalous_TE = F.normalize(text_TPE[:, 1:].mean(1), dim=-1)
    poles_T2E = torch.stack([text_TPE[:, 0], anomalous_TE], dim=1)
    cosine_TX2 = tokens_TBNE.flatten(1, 2) @ poles_T2E.mT
    distance_TX2 = (2 - 2 * cosine_TX2).clamp_min(_SMALLEST_SQUARE).sqrt()
    excess_TX = (distance_TX2[..., 0] - distance_TX2[..., 1]).clamp_min(0)
    return _mean(excess_TX, labels_TBN.flatten(1) == 0)


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen values of each lane; 0 where none is chosen."""
    total_T = (values * chosen).flatten(1).sum(1)
    return total_T / chosen.flatten(1).sum(1).clamp_min(1)
