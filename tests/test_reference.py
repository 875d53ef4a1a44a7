import torch

from apt_ray.backbone import ImageFeatures
from apt_ray.reference import ReferenceMemory


def _features(*vectors: tuple[float, ...]) -> ImageFeatures:
    tokens_BND = torch.nn.functional.normalize(torch.tensor([vectors]), dim=-1)
    return ImageFeatures(
        tokens_BNE=tokens_BND, cls_BE=tokens_BND[:, 0], layers={1: tokens_BND, 3: -tokens_BND}
    )


def test_the_distance_is_one_minus_the_largest_cosine_averaged_over_layers() -> None:
    memory = ReferenceMemory.of(_features((1.0, 0.0), (0.0, 1.0)))
    distance_BN = memory.distance(_features((1.0, 0.0), (1.0, 1.0), (-1.0, 0.0)))
    expected = torch.tensor([[0.0, 1 - 0.5**0.5, 1.0]])
    assert torch.allclose(distance_BN, expected, atol=1e-3)


def test_what_is_in_memory_is_at_distance_zero() -> None:
    support = _features((0.3, 0.4, 0.5), (0.9, -0.1, 0.2))
    assert ReferenceMemory.of(support).distance(support).abs().max() < 1e-3


def test_the_memory_is_kept_in_half_precision() -> None:
    memory = ReferenceMemory.of(_features((1.0, 2.0)))
    assert {tokens.dtype for tokens in memory.layers.values()} == {torch.float16}
