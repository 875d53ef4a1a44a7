"""The losses of prompts on self-generated anomalies, those of every step by their gradients alone.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from functools import reduce

import torch
import torch.nn.functional as F

from apt_ray.detection.rule import worst_patches
from apt_ray.features.constants import BackboneConstants

_SMALLEST_SQUARE = 1e-12


def gradients_at_text(
    tokens_TBNE: torch.Tensor,
    labels_TBN: torch.Tensor,
    text_TPE: torch.Tensor,
    meta_T2E: torch.Tensor | None,
    constants: BackboneConstants,
) -> tuple[torch.Tensor, ...]:
    """Gradients `(T, P, E)` to the text features: of the synthetic loss, and with a meta-prompt of
    the divergence from it.

    The synthetic loss of a lane, patch level: focal loss (gamma 2; Lin et al., arXiv 1708.02002)
    plus Dice (Milletari et al., arXiv 1606.04797), smoothed by 1, on the anomalous probability.
    Image level: cross-entropy of the mean over the most anomalous 1 % of the patches. Labels of -1
    are ignored. The divergence is KL(p_meta || p_learned) between normal and anomalous, whichever
    of the anomalous prompts it is, averaged over the patches.

    Both see the prompts through a patch's log-odds alone, and these see how anomalous prompts
    differ from the normal one. The tokens, by far the largest tensor, are read once for all
    cosines and once for all gradients.
    """
    scale, bias = constants.dense_scale, constants.dense_bias
    anomalous, tokens_TXE = text_TPE.shape[1] - 1, tokens_TBNE.flatten(1, 2)
    known = [text_TPE] if meta_T2E is None else [text_TPE, meta_T2E]
    apart_TQE = torch.cat([text[:, 1:] - text[:, :1] for text in known], dim=1)
    # In this order a CPU reads the tokens as they lie.
    logit_TQX = torch.bmm(tokens_TXE, scale * apart_TQE.mT).mT.contiguous().add_(bias)
    learned_TAX = logit_TQX[:, :anomalous]
    odds_TX = reduce(torch.logaddexp, learned_TAX.unbind(1))
    p_TX = odds_TX.sigmoid()
    at_p_TBN = _gradient_of_synthetic_loss(p_TX.view(labels_TBN.shape), labels_TBN)
    at_odds = [at_p_TBN.flatten(1) * p_TX * (1 - p_TX)]
    if meta_T2E is not None:
        at_odds.append((p_TX - logit_TQX[:, -1].sigmoid()) / p_TX.shape[1])
    slope_TAX = (learned_TAX - odds_TX[:, None]).exp_()
    at_logit_TGAX = torch.stack(at_odds, dim=1)[:, :, None] * slope_TAX[:, None]
    at_TYE = scale * torch.bmm(at_logit_TGAX.flatten(1, 2), tokens_TXE)
    return tuple(
        torch.cat([-at_TAE.sum(1, keepdim=True), at_TAE], dim=1)
        for at_TAE in at_TYE.chunk(len(at_odds), dim=1)
    )


def _gradient_of_synthetic_loss(p_TBN: torch.Tensor, labels_TBN: torch.Tensor) -> torch.Tensor:
    """`(T, B, N)`, to anomalous probabilities; nearer than 1e-6 to certain they count as that."""
    given_TBN, p_TBN = p_TBN, p_TBN.clamp(1e-6, 1 - 1e-6)
    is_anomalous_TBN = labels_TBN == 1
    anomalous_TBN = is_anomalous_TBN.to(p_TBN.dtype)
    known_TBN = (labels_TBN >= 0).to(p_TBN.dtype)

    true_TBN = torch.where(is_anomalous_TBN, p_TBN, 1 - p_TBN)
    wrong_TBN = 1 - true_TBN
    at_true_TBN = wrong_TBN * (2 * true_TBN.log() - wrong_TBN / true_TBN)
    known_T11 = known_TBN.sum((1, 2), keepdim=True)
    focal_TBN = (2 * anomalous_TBN - 1) * known_TBN * at_true_TBN / known_T11.clamp_min(1)

    covered_T11 = (p_TBN * anomalous_TBN).sum((1, 2), keepdim=True)
    total_TBN = p_TBN * known_TBN + anomalous_TBN
    total_T11 = total_TBN.sum((1, 2), keepdim=True) + 1
    dice_TBN = ((2 * covered_T11 + 1) / total_T11 * known_TBN - 2 * anomalous_TBN) / total_T11

    count = worst_patches(p_TBN.shape[-1])
    worst = p_TBN.topk(count)
    worst_TB1 = worst.values.mean(-1, keepdim=True)
    has_anomaly_TB1 = is_anomalous_TBN.any(-1, keepdim=True)
    # An image whose only region is too small for any patch says neither normal nor anomalous.
    is_known_TB1 = has_anomaly_TB1 | (labels_TBN == 0).all(-1, keepdim=True)
    image_TB1 = is_known_TB1 / torch.where(has_anomaly_TB1, -worst_TB1, 1 - worst_TB1)
    image_TB1 = image_TB1 / (count * is_known_TB1.sum(1, keepdim=True).clamp_min(1))

    at_p_TBN = (focal_TBN + dice_TBN).scatter_add_(
        2, worst.indices, image_TB1.expand(-1, -1, count)
    )
    return at_p_TBN * (p_TBN == given_TBN)


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
