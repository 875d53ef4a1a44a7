import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from apt_ray.config import FitSettings
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import (
    Scale,
    Scales,
    ScoreRule,
    anomalous_log_odds,
    anomalous_probability,
    anomaly_maps,
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


def test_log_odds_are_those_of_the_probability() -> None:
    g = torch.Generator().manual_seed(0)
    tokens, text = torch.randn(5, 8, generator=g), torch.randn(3, 8, generator=g)
    odds = anomalous_log_odds(tokens, text, CONSTANTS)
    assert torch.allclose(odds.sigmoid(), anomalous_probability(tokens, text, CONSTANTS), atol=1e-5)


def test_evidence_is_measured_in_deviations_and_counts_no_more_than_five() -> None:
    scale = Scale.of(torch.tensor([1.0, 3.0]), smallest=0.1)
    assert (scale.mean, scale.sd) == pytest.approx((2, 2**0.5))
    evidence = 2 + 2**0.5 * torch.tensor([-3.0, 0.0, 1.0, 2.5, 5.0, 50.0])
    assert scale.excess(evidence).tolist() == pytest.approx([0, 0, 0.04, 0.25, 1, 1])
    assert Scale.of(torch.zeros(4), smallest=0.1).sd == 0.1


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
    """Written out for one patch on a map of one pixel, so that nothing is smoothed away."""
    backbone = FakeBackbone(patches=1, patch=1)
    red, blue = (backbone.preprocess([Image.new("RGB", (1, 1), c)]) for c in ("red", "blue"))
    memory = ReferenceMemory.of(backbone.encode_images(red))
    features = backbone.encode_images(blue)
    text_PE = torch.tensor([[0, 0, 1.0, 0], [0, 0.8, 0, 0.6]])  # blue is rather normal
    odds = -10 * (1 - 0.6) * 0.5**0.5
    scales = Scales(
        prompts=Scale(mean=odds - 2, sd=1), layers={0: Scale(mean=0.1, sd=0.2)}
    )  # two deviations; a distance of 0.5 is two as well
    rule = ScoreRule.of(backbone, FitSettings(reference_weight=0.25, cls_weight=0.5))
    fused = 0.4
    p_cls = 1 / (1 + math.exp(-odds))
    maps_1SS, scores_1 = rule.score(features, text_PE, memory, scales)
    assert maps_1SS.flatten().tolist() == pytest.approx([fused], abs=1e-3)
    assert scores_1.item() == pytest.approx(0.5 * fused + 0.5 * p_cls, abs=1e-3)
    # Nothing of the map counts where nothing is of interest.
    maps_1SS, scores_1 = rule.score(
        features, text_PE, memory, scales, interest_SS=torch.zeros(1, 1)
    )
    assert maps_1SS.item() == 0
    assert scores_1.item() == pytest.approx(0.5 * p_cls, abs=1e-3)


def test_layers_and_prompts_are_brought_to_the_finest_grid_and_averaged_as_squares() -> None:
    rule = ScoreRule.of(
        FakeBackbone(patches=2, patch=8), FitSettings(reference_weight=0.5, cls_weight=0)
    )
    one = Scale(mean=0, sd=1)
    scales = Scales(prompts=one, layers={0: one, 1: one})
    fine_1M, coarse_1M = torch.zeros(1, 16 * 16), torch.full((1, 1), 5.0)
    maps, scores = rule.score_evidence(torch.full((1, 4), 2.5), {0: fine_1M, 1: coarse_1M}, scales)
    # (0.5 * 0.25 + 0.5 * (0 + 1) / 2) ** 0.5 everywhere
    assert maps.flatten().tolist() == pytest.approx([0.375**0.5] * 256)
    assert scores.item() == pytest.approx(0.375**0.5)


def test_a_score_is_taken_over_the_highest_half_percent() -> None:
    rule = ScoreRule.of(FakeBackbone(patches=20, patch=1), FitSettings())
    p_1N = torch.zeros(1, 400)
    p_1N[0, 190] = 1
    maps, scores = rule.score_patches(p_1N)
    assert scores.item() == pytest.approx(maps.flatten().topk(2).values.mean().item())


def test_outside_of_the_region_of_interest_nothing_counts() -> None:
    rule = ScoreRule.of(FakeBackbone(patches=8, patch=8), FitSettings())
    odds_1N = torch.full((1, 64), 0.5)
    odds_1N[0, 9] = 4.5  # second row, second column
    one = Scale(mean=0, sd=1)
    scales = Scales(prompts=one, layers={0: one})
    inside_SS = torch.zeros(64, 64)
    inside_SS[32:, 32:] = 1
    whole, inside = (
        rule.score_evidence(odds_1N, {0: odds_1N}, scales, interest_SS=interest)
        for interest in (None, inside_SS)
    )
    assert whole[1].item() > 0.5
    assert inside[1].item() == pytest.approx(0.1, abs=1e-3)
    assert inside[0][0, :32].max() == 0
    assert torch.equal(inside[0][0, 32:, 32:], whole[0][0, 32:, 32:])


def test_maps_of_certain_patches_stay_within_bounds() -> None:
    for size in (128, 320, 321):
        maps = anomaly_maps(torch.ones(1, 40 * 40), (40, 40), size)
        assert maps.max() <= 1
        assert maps.min() > 0.999
