import pytest
import torch
import torch.nn.functional as F

from apt_ray.detection.kinds import MOST_OF_A_KIND, Kinds, look
from apt_ray.features.protocol import ImageFeatures


def seen(*layers_MD: torch.Tensor) -> ImageFeatures:
    """One image."""
    return ImageFeatures(
        tokens_BNE=layers_MD[0][None],
        cls_BE=layers_MD[0][:1],
        layers={layer: tokens_MD[None] for layer, tokens_MD in enumerate(layers_MD)},
    )


def test_only_the_most_anomalous_part_is_looked_at() -> None:
    map_44 = torch.zeros(4, 4)
    map_44[:2, :2] = torch.tensor([[0.8, 0.6], [0.5, 0.1]])
    map_44[3, 3] = 0.75  # another one
    fine, coarse = torch.randn(16, 3), torch.randn(4, 5)
    (found,) = look(seen(fine, coarse), map_44[None])
    expected = (
        torch.cat([F.normalize(fine[0] + fine[1], dim=0), F.normalize(coarse[0], dim=0)]) / 2**0.5
    )
    assert torch.allclose(found, expected, atol=1e-6)
    # How high the map is says nothing of a kind.
    assert torch.allclose(look(seen(fine, coarse), 0.1 * map_44[None])[0], found, atol=1e-6)


def test_a_kind_is_told_by_its_examples() -> None:
    axes = torch.eye(4)
    examples = [("scratch", axes[0]), ("pit", axes[1]), ("scratch", axes[2])]
    kinds = Kinds.of(examples)
    assert kinds.counts == {"pit": 1, "scratch": 2}
    found = kinds.probabilities(axes)
    assert [max(each, key=each.__getitem__) for each in found[:2]] == ["scratch", "pit"]
    for each in found:
        assert list(each) == ["pit", "scratch"]
        assert sum(each.values()) == pytest.approx(1)


def test_the_newest_examples_of_a_kind_are_kept() -> None:
    axes = torch.eye(MOST_OF_A_KIND + 2)
    kinds = Kinds.of([("pit", axis) for axis in axes])
    again = Kinds.of([*kinds.examples, ("scratch", axes[0])])
    assert again.counts == {"pit": MOST_OF_A_KIND, "scratch": 1}
    assert torch.equal(torch.stack([x for _, x in again.examples[:-1]]), axes[2:])
