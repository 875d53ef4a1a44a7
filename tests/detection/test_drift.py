"""Drift: what is promised of false alarms, and what is told of a change."""

import math
from datetime import datetime

import numpy as np
import pytest
from PIL import Image, ImageFilter

from apt_ray.data.samples.factory import draw_sample
from apt_ray.detection.drift import (
    LIVE,
    TESTS,
    Appearance,
    DriftAlarm,
    DriftSettings,
    DriftWatch,
    Panel,
    Tails,
    appearance_of,
)

RUNS, IMAGES = 1000, 1000
QUICK = DriftSettings(reference=100)


class Camera:
    """Images whose every stream is normal noise around what a test says."""

    def __init__(self, watch: DriftWatch, seed: int = 0) -> None:
        self.watch = watch
        self.rng = np.random.default_rng(seed)
        self.clock = 1_000_000.0

    def take(self, images: int, *, defective: float = 0.0, **shift: float) -> list[DriftAlarm]:
        """So many images, a second each; shifts are in standard deviations. The alarms raised."""
        alarms: list[DriftAlarm] = []
        for _ in range(images):
            noise = {name: self.rng.normal() + shift.get(name, 0) for name in shift_names}
            self.clock += 1
            is_bad = self.rng.random() < defective
            alarms += self.watch.add(
                score=0.8 if is_bad else 0.3 + 0.02 * noise["score"],
                appearance=Appearance(
                    brightness=0.5 + 0.01 * noise["brightness"],
                    sharpness=-2 + 0.1 * noise["sharpness"],
                    colour=(0.33 + 0.005 * noise["colour"], 0.33),
                ),
                features_W=np.array([1, 0.1 * noise["appearance"], 0.1 * self.rng.normal()]),
                at=self.clock,
            )
        return alarms


shift_names = ("score", "brightness", "sharpness", "colour", "appearance")


def test_false_alarms_stay_below_what_is_promised_however_few_are_compared_with() -> None:
    promised = 0.2
    limit = IMAGES / promised
    for size in (1, 4, 16, 99):
        rng = np.random.default_rng(size)
        tails = Tails.of(rng.gumbel(size=(size, RUNS)), 0.0)
        alarmed = np.zeros(RUNS, np.bool_)
        for _ in range(IMAGES):
            tails.add(rng.gumbel(size=RUNS))
            alarmed |= tails.evidence >= limit
        # Three standard deviations of the share of so many runs.
        assert alarmed.mean() < promised + 3 * math.sqrt(promised * (1 - promised) / RUNS)


def test_all_streams_of_a_category_keep_the_rate_together() -> None:
    settings = DriftSettings(false_alarms=2e-4, reference=100, tolerance=0)
    rng = np.random.default_rng(0)
    shape = (RUNS, len(LIVE))
    # Larger than any stream's own least change, so that nothing is held back.
    panel = Panel(LIVE, 100 * rng.normal(size=(75, *shape)), settings)
    alarmed = np.zeros(RUNS, np.bool_)
    for _ in range(IMAGES):
        alarmed |= panel.add(100 * rng.normal(size=shape)).any(1)
    assert 0 < alarmed.mean() < 2e-4 * IMAGES
    # And what changes is told in every run.
    for _ in range(200):
        alarmed |= panel.add(100 * rng.normal(size=shape) + [0, 300, 0, 0, 0]).any(1)
    assert alarmed.all()


@pytest.mark.parametrize(
    ("shift", "direction", "says"),
    [
        ({"score": 6.0}, "higher", "parts score higher than they did"),
        ({"score": -6.0}, "lower", "parts score lower than they did"),
        ({"brightness": -6.0}, "lower", "images are darker than they were"),
        ({"brightness": 6.0}, "higher", "images are brighter than they were"),
        ({"sharpness": -6.0}, "lower", "images are blurrier than they were"),
        ({"colour": 6.0}, "higher", "images have other colours than they had"),
        ({"appearance": -8.0}, "higher", "images look different than they did"),
    ],
)
def test_a_change_is_told_in_words_with_its_time(
    shift: dict[str, float], direction: str, says: str
) -> None:
    camera = Camera(DriftWatch(QUICK, seed=0))
    assert camera.take(1000) == []
    assert camera.watch.learning == 0
    (stream,) = shift
    assert max(camera.watch.evidence().values()) < 0.7
    changed_at = camera.clock
    (alarm,) = camera.take(100, **shift)
    assert (alarm.stream, alarm.direction, alarm.says) == (stream, direction, says)
    assert alarm.images < 50
    assert (alarm.after > alarm.before) is (direction == "higher")
    assert abs(_seconds(alarm.since) - changed_at) < 15
    assert _seconds(alarm.at) > changed_at
    assert camera.watch.alarms == (alarm,)
    assert camera.watch.evidence()[alarm.stream] == 1
    # It is told once.
    assert camera.take(100, **shift) == []


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_a_slow_change_is_told_before_it_is_large() -> None:
    camera = Camera(DriftWatch(QUICK, seed=0))
    assert camera.take(1000) == []
    for step in range(2000):
        if alarms := camera.take(1, brightness=-10 * step / 2000):
            break
    assert [alarm.stream for alarm in alarms] == ["brightness"]
    assert 500 < step < 1300


def test_a_share_of_defects_is_no_drift_but_a_rising_one_is() -> None:
    camera = Camera(DriftWatch(QUICK, seed=0))
    assert camera.take(3000, defective=0.04) == []
    (alarm,) = camera.take(200, defective=0.4)
    assert (alarm.stream, alarm.direction) == ("score", "higher")


def test_calibration_images_are_compared_with_from_the_first_image_on() -> None:
    scores = np.random.default_rng(1).normal(0.3, 0.02, 40).tolist()
    same = Camera(DriftWatch(QUICK, calibration=scores, seed=0))
    assert same.take(1000) == []
    assert "calibration" in same.watch.evidence()
    other = Camera(DriftWatch(QUICK, calibration=scores, seed=0))
    (alarm,) = other.take(60, score=6)
    assert other.watch.learning == 40
    assert (alarm.stream, alarm.says) == (
        "calibration",
        "parts score higher than the calibration images",
    )
    assert alarm.before == pytest.approx(np.mean(scores), abs=1e-3)
    # Four of them say little, and no more than that.
    few = Camera(DriftWatch(QUICK, calibration=[0.28, 0.3, 0.31, 0.33], seed=0))
    assert few.take(60, score=1) == []


def test_a_reset_compares_with_what_was_or_learns_anew() -> None:
    camera = Camera(DriftWatch(QUICK, seed=0))
    camera.take(500)
    assert camera.take(60, brightness=-6)
    camera.watch.reset()
    assert camera.watch.alarms == ()
    assert max(camera.watch.evidence().values()) == 0
    assert camera.take(500) == []  # the lamp is clean
    assert camera.take(60, brightness=-6)
    camera.watch.reset()
    assert camera.take(60, brightness=-6)  # it was not
    camera.watch.reset(anew=True)
    assert camera.watch.learning == 100
    assert camera.watch.evidence() == {}
    assert camera.take(500, brightness=-6) == []
    assert camera.take(60)[0].says == "images are brighter than they were"


def test_images_without_any_difference_are_no_drift() -> None:
    watch = DriftWatch(QUICK, calibration=[0.5, 0.5], seed=0)
    grey = Appearance(brightness=0.5, sharpness=0.0, colour=(1 / 3, 1 / 3))
    for _ in range(1000):
        assert watch.add(score=0.5, appearance=grey, features_W=np.zeros(3), at=0) == ()
    # What is no number is left out.
    before = watch.evidence()
    for score, features_W in ((math.nan, np.zeros(3)), (0.5, np.array([math.inf, 0, 0]))):
        assert watch.add(score=score, appearance=grey, features_W=features_W, at=0) == ()
    assert watch.evidence() == before


def test_appearance_tells_light_focus_and_colour_apart() -> None:
    image = draw_sample("textile", seed=3)[0]

    def seen(image: Image.Image) -> Appearance:
        pixels_HW3 = np.asarray(image, np.float32) / 255
        return appearance_of(np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1)))

    plain = seen(image)
    darker = seen(image.point(lambda value: 0.7 * value))
    assert darker.brightness == pytest.approx(0.7 * plain.brightness, abs=0.01)
    assert darker.sharpness == pytest.approx(plain.sharpness, abs=0.05)
    assert darker.colour == pytest.approx(plain.colour, abs=0.003)
    blurred = seen(image.filter(ImageFilter.GaussianBlur(1)))
    assert blurred.sharpness < plain.sharpness - 0.5
    assert blurred.brightness == pytest.approx(plain.brightness, abs=0.01)
    red, green, blue = image.split()
    tinted = seen(Image.merge("RGB", (red, green, blue.point(lambda value: 0.8 * value))))
    assert tinted.colour[0] > plain.colour[0] + 0.01
    black = seen(Image.new("RGB", (8, 8)))
    assert (black.brightness, black.colour) == (0, (0, 0))
    assert math.isfinite(black.sharpness)


def test_the_number_of_tests_is_the_number_of_sides() -> None:
    panel = Panel(LIVE, np.random.default_rng(0).normal(size=(50, len(LIVE))), QUICK)
    assert 1 + len(panel.add(np.zeros(len(LIVE)))) == TESTS
