"""A linear patch head: logistic regression from patch tokens to normal or anomalous, on APT's bank.

X labelled patches, N patch tokens, E joint width.
"""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.baselines.support import Encoded, ImageRule, Support


def fit(support: Support) -> dict[str, ImageRule]:
    """One weight vector of any length and a bias; classes count alike."""
    tokens_XE, label_X = labelled_patches(support)
    head = LogisticRegression(class_weight="balanced", max_iter=1000)
    head.fit(tokens_XE.numpy(), label_X.numpy())
    device = support.backbone.device
    weight_E = torch.from_numpy(head.coef_[0]).float().to(device)
    bias = float(head.intercept_[0])

    def odds(encoded: Encoded) -> Tensor:
        return encoded.features.tokens_BNE @ weight_E + bias

    return support.with_memory("linear", odds)


def labelled_patches(support: Support) -> tuple[Tensor, Tensor]:
    """Tokens `(X, E)` and labels `(X,)` of noisy and clean patches, without the ignored ones."""
    bank = support.bank
    noisy_XE = bank.noisy_SDNE[support.settings.noise_strength].flatten(0, 2)
    clean_XE = bank.clean_SVNE.flatten(0, 2)
    noisy_X = bank.noisy_labels_SDN.flatten()
    label_X = torch.cat([noisy_X, noisy_X.new_zeros(len(clean_XE))])
    known_X = label_X >= 0
    return torch.cat([noisy_XE, clean_XE])[known_X].float(), label_X[known_X]
