from dataclasses import replace

import torch

from apt_ray.detection.reference import ReferenceMemory, coreset, encode_turns
from apt_ray.features.clip import FrozenCLIP
from apt_ray.features.protocol import ImageFeatures


def _mean(distances: dict[int, torch.Tensor]) -> float:
    return float(torch.cat([distance.flatten() for distance in distances.values()]).mean())


def _features(*vectors: tuple[float, ...]) -> ImageFeatures:
    tokens_BND = torch.nn.functional.normalize(torch.tensor([vectors]), dim=-1)
    return ImageFeatures(
        tokens_BNE=tokens_BND, cls_BE=tokens_BND[:, 0], layers={1: tokens_BND, 3: -tokens_BND}
    )


def test_directions_are_compared_by_their_cosine() -> None:
    memory = ReferenceMemory.of(_features((1.0, 0.0), (0.0, 1.0)))
    distances = memory.distances(_features((1.0, 0.0), (1.0, 1.0), (-1.0, 0.0)))
    expected = torch.tensor([[0.0, 1 - 0.5**0.5, 1.0]])
    assert torch.allclose(distances[1], expected, atol=1e-3)
    assert torch.allclose(distances[3], expected, atol=1e-3)


def test_what_has_a_length_is_compared_by_euclidean_distance() -> None:
    g = torch.Generator().manual_seed(0)
    known, query = (5 * torch.randn(1, places, 7, generator=g) for places in (9, 4))
    plain = _features((1.0, 0.0))
    memory = ReferenceMemory.of(replace(plain, layers={0: known}))
    (distance_BM,) = memory.distances(replace(plain, layers={0: query})).values()
    assert torch.allclose(distance_BM, torch.cdist(query, known).amin(-1), atol=0.02)


def test_what_is_in_memory_is_at_distance_zero() -> None:
    support = _features((0.3, 0.4, 0.5), (0.9, -0.1, 0.2))
    for distance_BM in ReferenceMemory.of(support).distances(support).values():
        assert distance_BM.abs().max() < 1e-3


def test_the_memory_is_kept_in_half_precision() -> None:
    memory = ReferenceMemory.of(_features((1.0, 2.0)))
    assert {tokens.dtype for tokens in memory.layers.values()} == {torch.float16}


def test_a_coreset_covers_what_it_leaves_out() -> None:
    g = torch.Generator().manual_seed(0)
    centres_KD = torch.nn.functional.normalize(torch.randn(5, 16, generator=g), dim=-1)
    tokens_MD = centres_KD.repeat_interleave(40, 0) + 0.02 * torch.randn(200, 16, generator=g)
    tokens_MD = torch.nn.functional.normalize(tokens_MD, dim=-1)
    chosen = coreset(tokens_MD, 5)
    assert sorted((chosen // 40).tolist()) == [0, 1, 2, 3, 4], "one of each group"
    assert (tokens_MD @ tokens_MD[chosen].T).amax(1).min() > 0.95
    assert torch.equal(coreset(tokens_MD, 500), torch.arange(200))


def test_the_memory_is_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    vectors = [tuple(row) for row in torch.randn(30, 4, generator=g).tolist()]
    memory = ReferenceMemory.of(_features(*vectors), 7)
    assert {tuple(tokens.shape) for tokens in memory.layers.values()} == {(7, 4)}


def test_a_turned_image_is_known_to_a_memory_of_turns(backbone: FrozenCLIP) -> None:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=g)
    image = torch.nn.functional.interpolate(coarse, size=128, mode="bicubic").clamp(0, 1)
    turns = encode_turns(image, 4, backbone)
    assert len(turns) == 3
    quarter = backbone.encode_images(image.rot90(1, (2, 3)))
    plain = ReferenceMemory.of(backbone.encode_images(image))
    turned = ReferenceMemory.of(ImageFeatures.concatenate(turns))
    far, near = (_mean(memory.distances(quarter)) for memory in (plain, turned))
    assert near < 0.05 * far
