import numpy as np
import pytest
from scipy.stats import binomtest

from apt_ray.detection.calibration import calibrate
from apt_ray.validation.verdicts import Rejected, Verdicts
from tests.validation.test_intervals import scores


def test_a_threshold_divides_the_images_of_every_kind() -> None:
    one = scores(0, 1.0)
    threshold = calibrate([0.1, 0.5], false_alarm_rate=0.4)
    verdicts = Verdicts.of(one, threshold)
    above = one.score_I > threshold.value
    types = np.array(one.defect_types)
    assert verdicts.good == Rejected(count=int(above[types == "good"].sum()), images=30)
    assert verdicts.defects == Rejected(count=int(above[types != "good"].sum()), images=30)
    assert list(verdicts.by_type) == ["crack", "stain"]
    for name, rejected in verdicts.by_type.items():
        assert rejected.share == above[types == name].mean()


def test_an_image_at_the_threshold_is_not_rejected() -> None:
    one = scores(0, 1.0)
    highest = float(one.score_I.max())
    assert Verdicts.of(one, calibrate([highest], 0.5)).defects.count == 0


@pytest.mark.parametrize(("count", "images"), [(0, 30), (3, 30), (30, 30), (1, 1), (199, 200)])
def test_intervals_are_those_of_clopper_and_pearson(count: int, images: int) -> None:
    expected = binomtest(count, images).proportion_ci(0.95, method="exact")
    interval = Rejected(count=count, images=images).interval
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-9)
