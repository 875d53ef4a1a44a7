import numpy as np
import pytest

from apt_ray.data.samples.belt import EMPTY, draw_belt
from apt_ray.errors import SettingsError


def test_the_belt_moves_parts_through_the_frame() -> None:
    frames = list(draw_belt(["good", EMPTY, "rust"], seed=1, size=64, speed=0.3))
    assert len(frames) == 13
    assert [part.number for part in frames[0].parts] == [0]
    assert frames[-1].parts[0].defect == "rust"
    assert abs(frames[-1].parts[0].x) < 1e-6
    bright = [(np.asarray(frame.image)[:, 24:40].mean() > 60) for frame in frames]
    assert bright[0]
    assert bright[-1]
    assert not bright[6]  # nothing lies at the place between
    again = list(draw_belt(["good", EMPTY, "rust"], seed=1, size=64, speed=0.3))
    assert all(one.image == other.image for one, other in zip(frames, again, strict=True))
    other = next(draw_belt(["good"], seed=2, size=64))
    assert other.image != frames[0].image


def test_the_belt_is_the_same_where_it_was_seen_before() -> None:
    frames = list(draw_belt(["good"] * 3, seed=1, size=64, speed=0.25, flicker=0))
    before, after = (np.asarray(frames[place].image, float) for place in (2, 3))
    # A quarter of half a frame is 8 pixels; light and noise differ a little.
    assert np.abs(before[:, 8:] - after[:, :-8]).mean() < 6
    assert np.abs(before - after).mean() > 10


def test_the_belt_stands_still_where_it_is_told_to() -> None:
    moving = list(draw_belt(["good"] * 3, size=64))
    standing = list(draw_belt(["good"] * 3, size=64, stops={1: 10}))
    assert len(standing) == len(moving) + 10
    places = [frame.parts[0].x for frame in standing if frame.parts[0].number == 1]
    assert max(places.count(place) for place in places) == 11


def test_unknown_defects_are_refused() -> None:
    with pytest.raises(SettingsError, match="no part is 'dent'"):
        next(draw_belt(["good", "dent"]))
