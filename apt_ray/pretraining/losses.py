"""The terms of the pretraining loss.

Shapes: P pairs, N patches, E joint width, K phrases, X rows of features (patches or images).
Patch labels are 1 anomalous, 0 normal, and NaN for patches that a mask barely touches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_ray.anomalies.noise import IGNORED, patch_labels
from apt_ray.detection import rule


def known_labels(mask_PHW: Tensor, patch_size: int) -> Tensor:
    """(P, N) float labels of the patches as a fit sees them, NaN for those that it ignores."""
    height, width = mask_PHW.shape[1:]
    labels_PN = patch_labels(mask_PHW, (height // patch_size, width // patch_size))
    return labels_PN.float().masked_fill(labels_PN == IGNORED, torch.nan)


def balanced_bce(logits_PN: Tensor, labels_PN: Tensor, *, focus: float = 0.0) -> Tensor:
    """Binary cross-entropy in which both classes weigh the same, and small defects as much as
    large ones; NaN labels do not count.

    With `focus` a patch weighs in proportion to (1 - the probability of its label) ** focus, as in
    focal loss (arXiv 1708.02002) but normalised: the hardest good patches make the false alarms.
    """
    is_anomalous, is_normal = labels_PN == 1, labels_PN == 0
    loss_PN = F.binary_cross_entropy_with_logits(
        logits_PN, labels_PN.nan_to_num(0), reduction="none"
    )
    hardness_PN = (1 - torch.exp(-loss_PN.detach())) ** focus
    per_image_P1 = is_anomalous.sum(1, keepdim=True).clamp(min=1).sqrt()
    return 0.5 * (
        _weighted_mean(loss_PN, hardness_PN * is_anomalous / per_image_P1)
        + _weighted_mean(loss_PN, hardness_PN * is_normal)
    )


def _weighted_mean(loss_PN: Tensor, weight_PN: Tensor) -> Tensor:
    return (loss_PN * weight_PN).sum() / weight_PN.sum().clamp(min=1e-6)


def top_mean(score_PN: Tensor) -> Tensor:
    """(P,): mean of each image's highest 2 % of the patches, of two at the least.

    Twice the share of the score rule: gradients reach more patches.
    """
    return rule.top_mean(score_PN, count=max(2, score_PN.shape[1] // 50))


def reference_distance(
    query_layers: Sequence[Tensor], reference_layers: Sequence[Tensor]
) -> Tensor:
    """(P, N): 1 - max cosine to the patches of the same pair's reference, mean over the layers."""
    distances = [
        1 - (F.normalize(query, dim=-1) @ F.normalize(reference, dim=-1).mT).amax(-1)
        for query, reference in zip(query_layers, reference_layers, strict=True)
    ]
    return torch.stack(distances).mean(0)


def multi_positive_contrast(logits_XK: Tensor, is_true_XK: Tensor) -> Tensor:
    """Cross-entropy of each row's softmax over the phrases against its true phrases, evenly."""
    target_XK = is_true_XK.float()
    counts_X1 = target_XK.sum(1, keepdim=True)
    loss_X = -(logits_XK.log_softmax(1) * target_XK / counts_X1.clamp(min=1)).sum(1)
    return (loss_X * (counts_X1[:, 0] > 0)).sum() / (counts_X1 > 0).sum().clamp(min=1)


def multi_label_bce(logits_XK: Tensor, is_true_XK: Tensor) -> Tensor:
    """Sigmoid cross-entropy in which true and false cells weigh the same."""
    loss_XK = F.binary_cross_entropy_with_logits(logits_XK, is_true_XK.float(), reduction="none")
    true = (loss_XK * is_true_XK).sum() / is_true_XK.sum().clamp(min=1)
    false = (loss_XK * ~is_true_XK).sum() / (~is_true_XK).sum().clamp(min=1)
    return 0.5 * (true + false)


def participation_ratio(features_XE: Tensor) -> Tensor:
    """How many directions the features fill evenly, 1 to E: tr(C)^2 / tr(C^2) of the covariance."""
    centred = features_XE - features_XE.mean(0)
    covariance = centred.T @ centred / len(centred)
    return covariance.trace() ** 2 / covariance.square().sum().clamp(min=1e-12)
