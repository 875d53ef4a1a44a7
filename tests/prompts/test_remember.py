"""What is remembered of support images, and what is held out, on an encoder that sees colours."""

import pytest
import torch
from PIL import Image

from apt_ray.config import FitSettings
from apt_ray.prompts.remember import HeldOut, remember
from tests.fakes import FakeBackbone

COLOURS = ("red", "lime", "blue")


def shown(*colours: str, **settings: int) -> tuple[FakeBackbone, dict[int, torch.Tensor], HeldOut]:
    """The encoder, the memory's layers and what was held out of images of one colour each."""
    backbone = FakeBackbone(patches=4, patch=4)
    pixels = backbone.preprocess([Image.new("RGB", (16, 16), colour) for colour in colours])
    memory, held_out = remember(
        backbone.encode_images(pixels), pixels, FitSettings.parse(settings), backbone
    )
    return backbone, memory.layers, held_out


def test_each_image_is_measured_against_the_others() -> None:
    _, _, held_out = shown(*COLOURS)
    assert held_out.source == "left-out support images"
    # (1, 0, 0, 1) and (0, 1, 0, 1) of unit length: a distance of one half, and none to itself.
    assert torch.allclose(held_out.distances[0], torch.full((3, 16), 0.5), atol=0.02)
    assert held_out.scales[0].mean == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({"reference_copies": 0}, 3),
        ({"reference_copies": 2}, 9),
        ({"reference_copies": 0, "reference_rotations": 4}, 12),
    ],
)
def test_copies_and_turns_join_the_memory(settings: dict[str, int], images: int) -> None:
    _, layers, _ = shown(*COLOURS, **settings)
    assert layers[0].shape == (images * 16, 4)
    _, bounded, _ = shown(*COLOURS, **settings, reference_size=20)
    assert bounded[0].shape == (20, 4)


def test_a_single_image_is_measured_against_other_views_of_it() -> None:
    _, layers, held_out = shown("red", reference_copies=3)
    assert held_out.source == "copies of the support image"
    assert len(layers[0]) == (1 + 3 + 7) * 16, "itself, copies, turned and mirrored"
    assert held_out.distances[0].shape == (1, 16)
    assert held_out.distances[0].max() < 0.02


def test_a_single_image_with_a_side_is_told_from_its_other_views() -> None:
    backbone = FakeBackbone(patches=4, patch=4)
    marked = torch.zeros(1, 3, 16, 16)
    marked[0, 0, 2:4, 4:8] = 1  # off every axis, and within one patch
    _, held_out = remember(
        backbone.encode_images(marked), marked, FitSettings(reference_copies=0), backbone
    )
    # What one patch shows, some patch of a turned image shows as well.
    assert held_out.distances[0].max() < 1e-3
    assert held_out.scales[0].sd == pytest.approx(1.5 * 0.04, rel=0.1)


def test_the_same_seed_remembers_the_same() -> None:
    (_, first, _), (_, second, _), (_, other, _) = (
        shown(*COLOURS, seed=seed, reference_copies=2) for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
