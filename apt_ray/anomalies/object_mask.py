"""Where the part lies in an image, told by the frozen backbone itself.

A part that lies on a ground is unlike whatever the image's border shows; a surface is not. So
each patch is compared with the patches of the border, in a shallow layer, where tokens still speak
of their own place.

N patch tokens, D width of the vision tower, S images.
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

_NEIGHBOURS = 3
"""Border patches that a patch is compared with: one alike by chance says nothing."""

# What makes a mask a part, read off generated parts and surfaces: the two groups of patches differ
# clearly, the part is in one piece, and it hardly touches the border.
_MIN_SEPARATION = 0.75
_MIN_LARGEST = 0.9
_MAX_ON_BORDER = 0.15
_MIN_AREA = 0.03


def object_masks(tokens_SND: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What `ImageEncoder.encode_places` gives `(S, N, D)` -> masks `(S, N)`, bool, of the patches
    that show the part; all patches where there is none.

    An image without a part on a ground (a surface, or a part that is cut by the border) keeps the
    whole image.
    """
    masks = [_object_mask(tokens_ND, grid) for tokens_ND in tokens_SND.cpu()]
    return torch.from_numpy(np.stack(masks)).flatten(1)


def _object_mask(tokens_ND: torch.Tensor, grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    border_HW = np.ones(grid, dtype=bool)
    border_HW[1:-1, 1:-1] = False
    on_border = torch.from_numpy(border_HW).flatten().nonzero()[:, 0]
    similarity_NB = tokens_ND @ tokens_ND[on_border].T
    # A border patch is not compared with itself.
    similarity_NB[on_border, torch.arange(len(on_border))] = -1
    unlike_N = 1 - similarity_NB.topk(min(_NEIGHBOURS, len(on_border)), dim=1).values.mean(1)
    threshold, separation = otsu(unlike_N.double().numpy())
    mask_HW = unlike_N.numpy().reshape(grid) > threshold
    # A plain part is told from a plain ground by its outline alone.
    mask_HW = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(mask_HW, 1))[1:-1, 1:-1])
    labels_HW, count = ndimage.label(mask_HW)
    largest = np.bincount(labels_HW.ravel())[1:].max() if count else 0
    is_part = (
        separation >= _MIN_SEPARATION
        and mask_HW.mean() >= _MIN_AREA
        and largest >= _MIN_LARGEST * mask_HW.sum()
        and mask_HW[border_HW].mean() <= _MAX_ON_BORDER
    )
    return mask_HW if is_part else np.ones(grid, dtype=bool)


def otsu(values_X: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The threshold that parts values best in two groups, and how well: the share of their
    variance that lies between the groups, 0..1 (Otsu, IEEE Trans. SMC 9, 1979)."""
    sorted_X = np.sort(values_X)
    variance = sorted_X.var()
    if len(sorted_X) < 2 or variance == 0:
        return float(sorted_X[-1]), 0.0
    total = np.cumsum(sorted_X)
    below = np.arange(1, len(sorted_X))
    above = len(sorted_X) - below
    gap = (total[-1] - total[:-1]) / above - total[:-1] / below
    between = below * above / len(sorted_X) ** 2 * gap**2
    best = int(between.argmax())
    return float((sorted_X[best] + sorted_X[best + 1]) / 2), float(between[best] / variance)
