import numpy as np
import pytest

from apt_ray.calibration import calibrate, conformal_p_value, estimate


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
    for score in np.random.default_rng(1).random(200).tolist():
        p_value = threshold.p_value(score)
        assert p_value is not None
        assert (score > threshold.value) == (p_value <= 0.1)


def test_too_few_images_are_uncertified() -> None:
    threshold = calibrate([0.1, 0.3, 0.2], 0.05)  # 19 would be needed
    assert not threshold.certified
    assert threshold.value == pytest.approx(0.3 + 0.1)
    assert threshold.p_value(0.9) == pytest.approx(1 / 4)
    assert calibrate([0.0] * 19, 0.05).certified
    assert not calibrate([0.0] * 18, 0.05).certified


def test_left_out_support_images_promise_nothing() -> None:
    threshold = estimate([0.1, 0.3], "left-out support images")
    assert not threshold.certified
    assert threshold.p_value(1.0) is None
    assert threshold.value > 0.3
    assert estimate([0.2], "copies of the support image").value == 0.2
