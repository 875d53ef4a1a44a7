"""Which kind of anomaly a place resembles."""

import torch

from apt_ray.anomalies.families import ABOUT, SELECTION
from apt_ray.data.folders import Category
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.validation.resemblance import Kinds, direction, draw_kinds, join


def test_every_family_is_drawn_on_every_image(backbone: FrozenCLIP, category: Category) -> None:
    images = [read_image(path) for path in category.support_set(2, seed=0)]
    features = backbone.encode_images(backbone.preprocess(images))
    parts = list(draw_kinds(backbone, images, features.layers, draws=1, seed=0))
    assert len(parts) == 2
    kinds = join(parts)
    assert set(kinds.families) == set(SELECTION) == set(ABOUT)
    assert torch.allclose(kinds.directions_KD.norm(dim=-1), torch.ones(len(kinds.families)))
    # What was drawn is most like itself.
    assert all(
        join(parts[:1]).of(one_D)[0].similarity > parts[1].of(one_D)[-1].similarity
        for one_D in parts[0].directions_KD
    )


def test_the_most_similar_anomalies_speak_for_their_family() -> None:
    directions_KD = torch.eye(4)[[0, 0, 0, 1, 2]]
    kinds = Kinds(families=("a", "a", "a", "a", "b"), directions_KD=directions_KD)
    first, second = kinds.of(torch.tensor([0.8, 0.0, 0.6, 0.0]))
    assert (first.family, second.family) == ("a", "b")
    assert abs(first.similarity - 0.8) < 1e-6  # the one that points elsewhere is not heard


def test_a_direction_weighs_all_layers_alike() -> None:
    there = {1: torch.zeros(2), 2: torch.zeros(3)}
    here = {1: torch.tensor([0.0, 500.0]), 2: torch.tensor([0.0, 0.0, 0.1])}
    expected = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]) / 2**0.5
    assert torch.allclose(direction(here, there), expected)
