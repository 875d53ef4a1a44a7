import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from apt_ray.config import FitSettings
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import (
    ScoreRule,
    anomalous_probability,
    anomaly_maps,
    fuse,
    reference_probability,
    resize_map,
    top_mean,
)
from apt_ray.features.constants import BackboneConstants
from tests.fakes import FakeBackbone

CONSTANTS = BackboneConstants(
    dense_scale=2.0,
    dense_bias=0.5,
    reference_scale=10.0,
    reference_bias=-1.0,
    reference_layers=(0,),
)


def test_the_prompt_probability_equals_a_written_out_softmax() -> None:
    token = torch.tensor([[0.6, 0.8, 0.0]])
    text = torch.eye(3)  # one normal and two anomalous prompts
    normal, first, second = (
        math.exp(2 * 0.6),
        math.exp(2 * 0.8 + 0.5),
        math.exp(0.5),
    )
    expected = (first + second) / (normal + first + second)
    assert anomalous_probability(token, text, CONSTANTS).item() == pytest.approx(expected)


def test_the_reference_probability_is_even_where_the_constants_say() -> None:
    assert reference_probability(torch.tensor(0.1), CONSTANTS).item() == pytest.approx(0.5)


def test_fusion_is_a_weighted_harmonic_mean_whose_ends_are_its_parts() -> None:
    p, q = torch.tensor([0.2, 0.0]), torch.tensor([0.8, 0.5])
    assert torch.equal(fuse(p, q, 0), p)
    assert torch.equal(fuse(p, q, 1), q)
    assert fuse(p, q, 0.25)[0].item() == pytest.approx(1 / (0.75 / 0.2 + 0.25 / 0.8))
    assert fuse(p, q, 0.5)[1].item() == pytest.approx(0, abs=1e-30)


def test_top_mean_takes_one_percent_and_at_least_one() -> None:
    assert top_mean(torch.arange(300.0)).item() == pytest.approx(298)
    assert top_mean(torch.tensor([1.0, 5.0])).item() == 5


def test_maps_are_bilinear_and_smoothed_like_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    p_BN = torch.rand(2, 16 * 16, generator=g)
    ours = anomaly_maps(p_BN, (16, 16), 240)[1].numpy()
    enlarged = torch.nn.functional.interpolate(
        p_BN.reshape(2, 1, 16, 16), size=(240, 240), mode="bilinear"
    )[1, 0].numpy()
    theirs = ndimage.gaussian_filter(enlarged, sigma=4, truncate=8)
    inner = slice(30, -30)  # the borders are weighted differently
    assert np.abs(ours - theirs)[inner, inner].max() < 1e-3
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_a_map_is_brought_to_width_and_height() -> None:
    assert resize_map(torch.rand(32, 32), (50, 20)).shape == (20, 50)
    resized = resize_map(torch.tensor([[0.0, 1.0]]), (4, 1))
    assert resized.flatten().tolist() == [0, 0.25, 0.75, 1], "pixels are areas, not points"


def test_a_score_is_made_of_patches_memory_and_whole_image() -> None:
    """Written out for two patches on a map of two pixels, so that nothing is smoothed away."""
    backbone = FakeBackbone(patches=1, patch=1)
    red, blue = (backbone.preprocess([Image.new("RGB", (1, 1), c)]) for c in ("red", "blue"))
    memory = ReferenceMemory.of(backbone.encode_images(red))
    features = backbone.encode_images(blue)
    text_PE = torch.tensor([[0, 0, 1.0, 0], [0, 0.8, 0, 0.6]])  # blue is rather normal
    rule = ScoreRule.of(backbone, FitSettings(reference_weight=0.25, cls_weight=0.5))
    p_prompt = 1 / (1 + math.exp(10 * (1 - 0.6) * 0.5**0.5))
    p_ref = 1 / (1 + math.exp(-(20 * 0.5 - 5)))
    fused = 1 / (0.75 / p_prompt + 0.25 / p_ref)
    maps_1SS, scores_1 = rule.score(features, text_PE, memory)
    assert maps_1SS.flatten().tolist() == pytest.approx([fused], abs=1e-3)
    assert scores_1.item() == pytest.approx(0.5 * fused + 0.5 * p_prompt, abs=1e-3)
    # Nothing of the map counts where nothing is of interest.
    maps_1SS, scores_1 = rule.score(features, text_PE, memory, interest_SS=torch.zeros(1, 1))
    assert maps_1SS.item() == 0
    assert scores_1.item() == pytest.approx(0.5 * p_prompt, abs=1e-3)


def test_outside_of_the_region_of_interest_nothing_counts() -> None:
    backbone = FakeBackbone(patches=8, patch=8)
    rule = ScoreRule.of(backbone, FitSettings())
    p_1N = torch.full((1, 64), 0.1)
    p_1N[0, 9] = 0.9  # second row, second column
    inside_SS = torch.zeros(64, 64)
    inside_SS[32:, 32:] = 1
    whole, inside = rule.score_patches(p_1N), rule.score_patches(p_1N, interest_SS=inside_SS)
    assert whole[1].item() > 0.5
    assert inside[1].item() == pytest.approx(0.1, abs=1e-3)
    assert inside[0][0, :32].max() == 0
    assert torch.equal(inside[0][0, 32:, 32:], whole[0][0, 32:, 32:])


def test_maps_of_certain_patches_stay_within_bounds() -> None:
    for size in (128, 320, 321):
        maps = anomaly_maps(torch.ones(1, 40 * 40), (40, 40), size)
        assert maps.max() <= 1
        assert maps.min() > 0.999
