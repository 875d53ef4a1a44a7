"""The reference memory: how far a place is from everything that the support images show.

B images, M_l places of reference layer l, K places in memory, D width of a layer.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from apt_ray.features.protocol import ImageEncoder, ImageFeatures
from apt_ray.tensors import is_traced

_UNIT = 0.01
"""Tokens whose lengths are 1 within this are compared by their directions."""

_TOKENS_PER_PASS = {"cpu": 1600}
"""Tokens that are multiplied with the memory at a time: what stays in a CPU's cache. Elsewhere
`_MOST_TOKENS_PER_PASS` bounds what the products take."""

_MOST_TOKENS_PER_PASS = 65_536


class ReferenceMemory:
    """Features of the support images, a bank for each reference layer.

    Attributes:
        layers: layer -> `(K, D)` features, float16.
    """

    def __init__(self, layers: Mapping[int, torch.Tensor]) -> None:
        self.layers = {layer: tokens_KD.half() for layer, tokens_KD in layers.items()}
        self._are_directions = {
            layer: are_directions(tokens_KD.float()) for layer, tokens_KD in self.layers.items()
        }

    @classmethod
    def of(cls, support: ImageFeatures, size: int | None = None) -> "ReferenceMemory":
        """The memory of the support images' places: of all, or of a coreset of `size` a layer."""
        layers = {layer: tokens.flatten(0, 1) for layer, tokens in support.layers.items()}
        if size is not None:
            layers = {layer: tokens[coreset(tokens, size)] for layer, tokens in layers.items()}
        return cls(layers)

    def to(self, device: torch.device) -> "ReferenceMemory":
        """The same memory on another device."""
        return ReferenceMemory({layer: tokens.to(device) for layer, tokens in self.layers.items()})

    def distances(self, features: ImageFeatures) -> dict[int, torch.Tensor]:
        """Layer -> distance of each place to the nearest one in memory, `(B, M_l)` from 0.

        Cosine distances, 0..2, where tokens are of unit length; else Euclidean ones, as in
        PatchCore (arXiv 2106.08265).
        """
        return {
            layer: self._distance(layer, tokens_BMD)
            for layer, tokens_BMD in features.layers.items()
        }

    def _distance(self, layer: int, tokens_BMD: torch.Tensor) -> torch.Tensor:
        # Multiplied in float32, which is what CPUs are fast at; kept in float16, because a replica
        # holds the memories of a thousand categories.
        memory_KD = self.layers[layer].float()
        if self._are_directions[layer]:
            return 1 - _most(tokens_BMD, memory_KD, torch.zeros_like(memory_KD[:, 0]))
        half_K = memory_KD.square().sum(-1) / 2
        nearest_BM = _most(tokens_BMD, memory_KD, -half_K)
        return (tokens_BMD.square().sum(-1) - 2 * nearest_BM).clamp_min(0).sqrt()


def are_directions(tokens_KD: torch.Tensor) -> bool:
    """Whether tokens are compared by their directions alone: all of them are of unit length."""
    return bool(((tokens_KD.norm(dim=1) - 1).abs() < _UNIT).all())


def _most(
    tokens_BMD: torch.Tensor, memory_KD: torch.Tensor, offset_K: torch.Tensor
) -> torch.Tensor:
    """The largest product of each token with any in memory, an offset for each added, `(B, M)`."""
    if is_traced():
        return (tokens_BMD @ memory_KD.T + offset_K).amax(-1)
    tokens_XD = tokens_BMD.flatten(0, 1)
    count = min(_TOKENS_PER_PASS.get(tokens_XD.device.type, _MOST_TOKENS_PER_PASS), len(tokens_XD))
    # One buffer for all passes: asked for anew, a large one costs more than the products in it.
    products_xK = tokens_XD.new_empty(count, len(memory_KD))
    most_X = tokens_XD.new_empty(len(tokens_XD))
    for tokens_xD, most_x in zip(tokens_XD.split(count), most_X.split(count), strict=True):
        pass_xK = products_xK[: len(tokens_xD)]
        torch.addmm(offset_K, tokens_xD, memory_KD.T, out=pass_xK)
        torch.amax(pass_xK, -1, out=most_x)
    return most_X.view(tokens_BMD.shape[:2])


def coreset(tokens_KD: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of at most `size` tokens such that every token has a near one among them.

    Greedy k-centre, as in PatchCore (arXiv 2106.08265): always the token next that is farthest
    from all chosen ones. The first is the one nearest to their mean.
    """
    if size >= len(tokens_KD):
        return torch.arange(len(tokens_KD))
    known_KD = tokens_KD.float()
    half_K = known_KD.square().sum(1) / 2
    chosen = [int((known_KD @ known_KD.mean(0) - half_K).argmax())]
    # Minus half the squared distance of each token to the nearest chosen one.
    nearest_K = torch.full_like(half_K, -torch.inf)
    latest_K = torch.empty_like(half_K)
    while len(chosen) < size:
        torch.mv(known_KD, known_KD[chosen[-1]], out=latest_K)
        latest_K.sub_(half_K).sub_(half_K[chosen[-1]])
        torch.maximum(nearest_K, latest_K, out=nearest_K)
        chosen.append(int(nearest_K.argmin()))
    return torch.tensor(chosen)


def encode_turns(
    pixels_S3HW: torch.Tensor, turns: int, backbone: ImageEncoder
) -> list[ImageFeatures]:
    """The features of the images turned by 1 to `turns - 1` times 360 / `turns` degrees.

    Corners that a turn leaves empty show the image mirrored at its edge.
    """
    encoded = []
    for turn in range(1, turns):
        angle = torch.tensor(2 * torch.pi * turn / turns)
        cos, sin = angle.cos(), angle.sin()
        rotation_23 = torch.stack(
            [torch.stack([cos, -sin, sin * 0]), torch.stack([sin, cos, sin * 0])]
        )
        grid = F.affine_grid(
            rotation_23.expand(len(pixels_S3HW), 2, 3), list(pixels_S3HW.shape), align_corners=False
        )
        turned = F.grid_sample(pixels_S3HW, grid, padding_mode="reflection", align_corners=False)
        encoded.append(backbone.encode_in_batches(turned))
    return encoded
