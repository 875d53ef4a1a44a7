"""AUROC, exact: the share of (normal, anomalous) pairs in the right order, ties counted half.

That is the Mann-Whitney statistic divided by the number of pairs (Hanley and McNeil, Radiology 143,
1982). Nothing is binned: every distinct score is a threshold.

B rows, X scores, R resamples, H levels of a histogram.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def auroc(sorted_normal: NDArray[Any], anomalous: NDArray[Any]) -> float:
    """Of normal scores, sorted already, and anomalous ones; at least one of each, none NaN.

    The normal ones are usually far more: they are counted by bisection, which keeps tens of
    millions of pixels cheap.
    """
    below = np.searchsorted(sorted_normal, anomalous, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(sorted_normal, anomalous, side="right").sum(dtype=np.int64)
    return (int(below) + int(not_above)) / (2 * sorted_normal.size * anomalous.size)


def auroc_of_rows(scores_BX: torch.Tensor, labels_BX: torch.Tensor) -> torch.Tensor:
    """`auroc` of each row: `(B,)` float64 on the CPU; any leading dimensions, which broadcast.

    Labels are 1 anomalous, 0 normal, anything else ignored. NaN where a row lacks one of the two.
    """
    scores_BX, labels_BX = torch.broadcast_tensors(scores_BX, labels_BX)
    width = scores_BX.shape[-1]
    scores, labels = (x.reshape(-1, width).cpu().numpy() for x in (scores_BX, labels_BX))
    values = np.full(len(scores), np.nan)
    for row, (score_X, label_X) in enumerate(zip(scores, labels, strict=True)):
        normal, anomalous = np.sort(score_X[label_X == 0]), np.sort(score_X[label_X == 1])
        if normal.size and anomalous.size:
            values[row] = auroc(normal, anomalous)
    return torch.from_numpy(values.reshape(scores_BX.shape[:-1]))


def auroc_of_counts(normal_RH: NDArray[Any], anomalous_RH: NDArray[Any]) -> NDArray[np.float64]:
    """Of histograms over the same H ascending levels: `(R,)`; counts may be fractions."""
    below_RH = normal_RH.cumsum(1) - 0.5 * normal_RH
    wins_R = (below_RH * anomalous_RH).sum(1)
    result: NDArray[np.float64] = wins_R / (normal_RH.sum(1) * anomalous_RH.sum(1))
    return result
