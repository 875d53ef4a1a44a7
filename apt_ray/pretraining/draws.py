"""Counter-based random numbers: one independent stream an image, drawn as tensor operations.

A number depends on its image's key and on how many were drawn before it, never on the batch it is
drawn in or on the device, so an image is the same in every batch.

Shapes: B images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Draws:
    """Streams of random numbers keyed by `key_B` (int64); every call advances all streams."""

    def __init__(self, key_B: Tensor) -> None:
        self.key_B = key_B
        self._drawn = 0

    @classmethod
    def from_seeds(cls, seeds_B: Tensor) -> Draws:
        """Streams of any int64 seeds, neighbouring ones included."""
        return cls(_mix(seeds_B * _GOLDEN))

    def __len__(self) -> int:
        return len(self.key_B)

    def fork(self, label: int) -> Draws:
        """Streams independent of these and of forks of other labels."""
        return Draws(_mix(self.key_B ^ _mix(torch.full_like(self.key_B, ~label))))

    def take(self, index: Tensor) -> Draws:
        """The untouched streams of some of the images."""
        return Draws(self.key_B[index])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) float32 in [low, high)."""
        count = math.prod(shape)
        counter = torch.arange(self._drawn, self._drawn + count, device=self.key_B.device)
        self._drawn += count
        bits = _mix(self.key_B[:, None] + counter * _GOLDEN)
        unit = ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24
        return (unit * (high - low) + low).reshape(len(self.key_B), *shape)

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """(B, *shape) float32 in [low, high), uniform in the logarithm."""
        return self.uniform(*shape, low=math.log(low), high=math.log(high)).exp()

    def integers(self, bound: int, *shape: int) -> Tensor:
        """(B, *shape) int64 in [0, bound)."""
        return (self.uniform(*shape) * bound).long().clamp_(max=bound - 1)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """(B, *shape) bool, true with the given probability."""
        return self.uniform(*shape) < probability

    def sign(self, *shape: int) -> Tensor:
        """(B, *shape) float32, -1 or 1."""
        return self.chance(0.5, *shape).float() * 2 - 1

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal (Box and Muller)."""
        radius = (-2 * (1 - self.uniform(*shape)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(*shape)).cos()


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, whose products wrap around."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _MIX_1
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
