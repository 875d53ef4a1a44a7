from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

from apt_ray.data.samples.factory import draw_sample
from apt_ray.detection.calibration import SPREAD, Threshold, calibrate, conformal_p_value, estimate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import FrozenCLIP

REPETITIONS = 1000
SURE = 1e-4
"""A test of a rate fails by chance once in ten thousand seeds; seeds are fixed."""

Floats = NDArray[np.float64]


def test_the_p_value_counts_scores_that_are_as_high() -> None:
    scores = (0.1, 0.2, 0.2, 0.4)
    assert conformal_p_value(scores, 0.5) == pytest.approx(1 / 5)
    assert conformal_p_value(scores, 0.2) == pytest.approx(4 / 5)
    assert conformal_p_value(scores, 0.0) == 1


def test_enough_images_certify_the_rate_and_give_the_right_order_statistic() -> None:
    scores = [i / 100 for i in range(1, 40)]  # 39 scores: j = floor(0.05 * 40) = 2
    threshold = calibrate(scores, 0.05)
    assert threshold.certified
    assert threshold.certified_false_alarm_rate == 0.05
    assert threshold.value == pytest.approx(0.38)
    assert threshold.p_value(0.385) == pytest.approx(2 / 40)


def test_flagging_and_p_value_agree() -> None:
    scores = np.random.default_rng(0).random(59).tolist()
    threshold = calibrate(scores, 0.1)
    for score in (*scores, *np.random.default_rng(1).random(200).tolist()):
        p_value = threshold.p_value(score)
        assert p_value is not None
        assert threshold.rejects(score) == (p_value <= 0.1)


def test_too_few_images_are_uncertified() -> None:
    threshold = calibrate([0.1, 0.3, 0.2], 0.05)  # 19 would be needed
    assert not threshold.certified
    assert threshold.value == pytest.approx(0.2 + SPREAD), "the highest of three says nothing"
    assert threshold.p_value(0.9) == pytest.approx(1 / 4)
    assert calibrate([0.0] * 19, 0.05).certified
    assert not calibrate([0.0] * 18, 0.05).certified


def test_a_dozen_images_set_the_threshold_at_the_highest() -> None:
    threshold = calibrate([i / 100 for i in range(12)], 0.05)
    assert not threshold.certified
    assert threshold.value == 0.11


def test_left_out_support_images_promise_nothing() -> None:
    threshold = estimate([0.1, 0.3], "left-out support images")
    assert not threshold.certified
    assert threshold.p_value(1.0) is None
    assert threshold.value == pytest.approx(0.2 + SPREAD)
    one_is_odd = [0.1, 0.1, 0.1, 0.9]
    assert estimate(one_is_odd, "left-out support images").value == pytest.approx(0.1 + SPREAD)


def false_alarms(
    draw: Callable[[np.random.Generator, int], Floats],
    set_threshold: Callable[[list[float]], Threshold],
    images: int,
) -> int:
    """How many of 1,000 normal images are rejected, each by a calibration set of its own."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(REPETITIONS):
        *calibration, score = draw(rng, images + 1).tolist()
        alarms += score > set_threshold(calibration).value
    return alarms


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "skewed": lambda rng, count: rng.beta(0.5, 8, count),
    "heavy-tailed": lambda rng, count: expit(rng.standard_cauchy(count)),
    "tied": lambda rng, count: rng.integers(0, 8, count) / 8,
}


@pytest.mark.parametrize(("images", "rate"), [(19, 0.05), (59, 0.05), (99, 0.01), (30, 0.1)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_stated_false_alarm_rate_holds(name: str, images: int, rate: float) -> None:
    assert calibrate([0.0] * images, rate).certified_false_alarm_rate == rate
    alarms = false_alarms(DISTRIBUTIONS[name], lambda scores: calibrate(scores, rate), images)
    assert alarms <= binom.isf(SURE, REPETITIONS, rate)
    if name != "tied":
        # Nor is the threshold so high that it could not fail: without ties the rate is exact.
        exact = int(rate * (images + 1)) / (images + 1)
        assert alarms >= binom.ppf(SURE, REPETITIONS, exact)


def test_what_is_uncertified_does_not_hold_the_rate() -> None:
    """The bound above is one that a plausible threshold can miss."""

    def too_few(scores: list[float]) -> Threshold:
        threshold = calibrate(scores, 0.05)
        assert not threshold.certified
        return threshold

    alarms = false_alarms(DISTRIBUTIONS["heavy-tailed"], too_few, 2)
    assert alarms > binom.isf(SURE, REPETITIONS, 0.05)


def test_the_rate_holds_for_generated_pictures_of_good_parts(
    backbone: FrozenCLIP, prompt_set: PromptSet
) -> None:
    """Each repetition draws its calibration images and its test image from a stock of good
    ones, without replacement: that leaves them exchangeable, and so the rate exact."""
    detector = Detector(backbone, prompt_set)
    pictures = [
        draw_sample(prompt_set.category, seed=seed, size=backbone.input_size)[0]
        for seed in range(80)
    ]
    features = backbone.encode_in_batches(backbone.preprocess(pictures))
    stock = detector.score(features)[1].numpy().astype(np.float64)
    assert len(set(stock)) == len(stock), "no ties"
    alarms = false_alarms(
        lambda rng, count: rng.choice(stock, count, replace=False),
        lambda scores: calibrate(scores, 0.05),
        39,
    )
    assert binom.ppf(SURE, REPETITIONS, 0.05) <= alarms <= binom.isf(SURE, REPETITIONS, 0.05)
