import pytest

from apt_ray.features.clip import FrozenCLIP
from apt_ray.video.settings import WatchSettings
from benchmarks.belt import learn, moving_belt, watch


@pytest.mark.slow
def test_each_defect_on_a_belt_is_an_event_and_hardly_anything_else(backbone: FrozenCLIP) -> None:
    detector = learn(backbone, 0, 192, calibrate=0, rate=0.01)
    belt = list(moving_belt(0, 70, 192, 0.24, gaps=1))
    assert len(belt) > 1000
    found = watch(belt, detector, WatchSettings(), whole=True)
    assert (found.found, found.defects) == (10, 10)
    assert 1000 * found.false <= len(belt)
    without = watch(belt, detector, WatchSettings(gate=False), whole=True)
    # Frames that are not inspected may move where an event ends, and not whether there is one.
    assert (without.found, without.false) == (found.found, found.false)
    assert without.summary.inspected > found.summary.inspected
