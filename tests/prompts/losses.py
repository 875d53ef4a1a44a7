"""The losses of one lane as they are defined, patch by patch, for autograd to differentiate.

B images, N patches, P prompts (0 normal, the others anomalous).
"""

import torch
import torch.nn.functional as F


def synthetic_loss(p_BN: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
    """Of anomalous probabilities."""
    focal, image = [], []
    covered = total = torch.zeros((), dtype=p_BN.dtype)
    for p_N, labels_N in zip(p_BN.clamp(1e-6, 1 - 1e-6), labels_BN.tolist(), strict=True):
        for p, label in zip(p_N, labels_N, strict=True):
            if label >= 0:
                true = p if label == 1 else 1 - p
                focal.append(-((1 - true) ** 2) * true.log())
                total = total + p + label
                covered = covered + p * label
        worst = p_N.topk(max(1, round(len(p_N) / 100))).values.mean()
        if 1 in labels_N:
            image.append(-worst.log())
        elif set(labels_N) == {0}:
            image.append(-(1 - worst).log())
    means = [torch.stack(values).mean() for values in (focal, image) if values]
    return sum(means, start=1 - (2 * covered + 1) / (total + 1))


def divergence(meta_BN2: torch.Tensor, learned_BNP: torch.Tensor) -> torch.Tensor:
    """KL(p_meta || p_learned) of log-probabilities, between normal and anomalous."""
    learned_BN2 = torch.stack([learned_BNP[..., 0], learned_BNP[..., 1:].logsumexp(-1)], dim=-1)
    return F.kl_div(
        learned_BN2.flatten(0, 1), meta_BN2.flatten(0, 1), log_target=True, reduction="batchmean"
    )
