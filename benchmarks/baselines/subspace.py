"""SubspaceAD: what the principal components of the support patches leave unexplained.

Patches are the descriptors of `benchmarks.baselines.descriptors`; the support images are turned in
eight rotations. The components kept explain 99 % of the variance.

N places of the finest grid, D channels of a descriptor, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.descriptors import descriptors
from benchmarks.baselines.support import ImageRule, Support

EXPLAINED = 0.99


@dataclass(frozen=True, slots=True)
class Subspace:
    """An affine subspace: its centre `(D,)` and its orthonormal components `(C, D)`."""

    mean_D: Tensor
    components_CD: Tensor

    @classmethod
    def of(cls, tokens_ND: Tensor) -> Subspace:
        """The fewest principal components that explain 99 % of the variance."""
        mean_D = tokens_ND.mean(0)
        centred_ND = (tokens_ND - mean_D).double()
        value_D, vector_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
        share_D = value_D.flip(0).cumsum(0) / value_D.sum()
        count = int((share_D < EXPLAINED).sum()) + 1
        return cls(mean_D, vector_DD.flip(1)[:, :count].T.float())

    def residual(self, tokens_ND: Tensor) -> Tensor:
        """Squared distance to the subspace, `(..., N)`."""
        centred_ND = tokens_ND - self.mean_D
        inside_ND = centred_ND @ self.components_CD.T @ self.components_CD
        return (centred_ND - inside_ND).square().sum(-1)


def fit(support: Support) -> dict[str, ImageRule]:
    """Principal components of the turned support images' patches."""
    subspace = Subspace.of(descriptors(support.turned).flatten(0, 1))
    # Descriptors have length 1, so a residual is at most 4.
    return {
        "subspace": support.by_patches(
            lambda encoded: subspace.residual(descriptors(encoded.features)) / 4
        )
    }
