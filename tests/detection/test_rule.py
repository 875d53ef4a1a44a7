import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from apt_ray.detection.rule import (
    anomalous_probability,
    anomaly_maps,
    auroc,
    fuse,
    reference_probability,
    resize_map,
    top_mean,
)
from apt_ray.features.constants import BackboneConstants

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
    p_BN = torch.rand(1, 16 * 16, generator=g)
    ours = anomaly_maps(p_BN, (16, 16), 240)[0].numpy()
    enlarged = torch.nn.functional.interpolate(
        p_BN.reshape(1, 1, 16, 16), size=(240, 240), mode="bilinear"
    )[0, 0].numpy()
    theirs = ndimage.gaussian_filter(enlarged, sigma=4, truncate=8)
    inner = slice(30, -30)  # the borders are weighted differently
    assert np.abs(ours - theirs)[inner, inner].max() < 1e-3
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_a_map_is_brought_to_width_and_height() -> None:
    assert resize_map(torch.rand(32, 32), (50, 20)).shape == (20, 50)


def test_batched_auroc_equals_scikit_learn_with_ties_and_ignored_entries() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (5, 200), generator=g).float()
    labels = torch.randint(-1, 2, (5, 200), generator=g)
    ours = auroc(scores, labels)
    for row in range(5):
        known = labels[row] >= 0
        theirs = roc_auc_score(labels[row][known], scores[row][known])
        assert ours[row].item() == pytest.approx(theirs)


def test_auroc_without_one_of_the_two_classes_is_not_a_number() -> None:
    assert auroc(torch.rand(1, 4), torch.zeros(1, 4)).isnan().all()
