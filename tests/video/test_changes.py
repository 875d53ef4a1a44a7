from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from apt_ray.video.changes import CameraNoise, Feed, SmallFrame, is_changed, small_frame

SCENE = np.random.default_rng(0).uniform(30, 220, (20, 20, 3)).repeat(16, 0).repeat(16, 1)


def camera(
    scene: NDArray[np.float64], seed: int, *, noise: float = 4.0, light: float = 1.0
) -> SmallFrame:
    """A frame of 320 pixels whose noise grows with light, as that of photons does."""
    rng = np.random.default_rng(seed)
    seen = np.clip(scene * light, 0, 255)
    seen = seen + noise * np.sqrt(seen / 128) * rng.standard_normal(scene.shape)
    return small_frame(Image.fromarray(np.rint(np.clip(seen, 0, 255)).astype(np.uint8)))


def learned(frames: list[SmallFrame]) -> CameraNoise:
    noise = CameraNoise()
    for before, after in pairwise(frames):
        noise.learn(before, after)
    return noise


@pytest.mark.parametrize("noise", [2.0, 4.0, 10.0])
def test_noise_is_estimated_from_the_stream(noise: float) -> None:
    frames = [camera(SCENE, seed, noise=noise) for seed in range(12)]
    estimate = learned(frames)
    assert estimate.is_known
    # A value of the small frame is the mean of 16 pixels, rounded.
    truth = np.sqrt((noise / 4) ** 2 * small_frame_of_scene() / 128 + 1 / 12)
    assert np.median(estimate.sd(frames[0]) / truth) == pytest.approx(1, abs=0.15)
    changed = [is_changed(frames[0], after, estimate) for after in frames[1:]]
    assert not any(changed)


def small_frame_of_scene() -> SmallFrame:
    return camera(SCENE, 0, noise=0)


def test_a_part_that_moves_through_a_share_of_the_frame_does_not_hide_the_noise() -> None:
    frames = []
    for seed in range(12):
        scene = SCENE.copy()
        scene[100:180, 20 * seed : 20 * seed + 80] = 240
        frames.append(camera(scene, seed))
    still = learned([camera(SCENE, seed) for seed in range(12)])
    assert np.median(learned(frames).sd(frames[0]) / still.sd(frames[0])) < 1.3
    assert all(is_changed(frames[0], after, learned(frames)) for after in frames[1:])


@pytest.mark.parametrize("speed", [2, 5, 16])
def test_a_surface_that_moves_is_never_taken_for_noise(speed: int) -> None:
    surface = np.random.default_rng(1).uniform(80, 140, (320, 2000, 3))
    frames = [camera(surface[:, speed * at : speed * at + 320], at) for at in range(40)]
    noise = learned(frames)
    reference, inspected = frames[0], 1
    for after in frames[1:]:
        if is_changed(reference, after, noise):
            reference, inspected = after, inspected + 1
    assert inspected == len(frames)


def test_light_may_flicker_but_not_change() -> None:
    frames = [camera(SCENE, seed) for seed in range(6)]
    noise = learned(frames)
    assert not is_changed(frames[0], camera(SCENE, 9, light=1.05), noise)
    assert is_changed(frames[0], camera(SCENE, 9, light=0.8), noise)


def test_what_is_as_small_as_a_defect_is_a_change() -> None:
    noise = learned([camera(SCENE, seed) for seed in range(6)])
    scene = SCENE.copy()
    scene[100:124, 100:124] -= 25  # 0.6 % of the frame
    assert is_changed(camera(SCENE, 7), camera(scene, 8), noise)
    # What changes little by little is a change in the end.
    slowly = [camera(SCENE * (1 + 0.002 * step), step) for step in range(60)]
    drifting = SCENE.copy()
    reference, changes = slowly[0], 0
    for step in range(60):
        drifting[100:150, 100:150] = SCENE[100:150, 100:150] - step
        changes += is_changed(reference, camera(drifting, step), noise)
    assert changes


def test_before_noise_is_known_everything_is_a_change_but_the_same_frame() -> None:
    noise = CameraNoise()
    noise.learn(camera(SCENE, 1), camera(SCENE, 1))
    assert not noise.is_known
    assert not is_changed(camera(SCENE, 1), camera(SCENE, 1), noise)
    assert is_changed(camera(SCENE, 1), camera(SCENE, 2), noise)


def test_a_frozen_camera_is_told_and_a_still_scene_is_not() -> None:
    feed = Feed(frozen_frames=5, jumps=True)
    still = [feed.look(camera(SCENE, seed)) for seed in range(30)]
    assert not any(frozen or jump for frozen, jump in still)
    frozen = [feed.look(camera(SCENE, 29))[0] for _ in range(8)]
    assert frozen == [False] * 4 + [True] * 4
    assert feed.look(camera(SCENE, 40)) == (False, False)
    loop = [feed.look(camera(SCENE, 41 + place % 6))[0] for place in range(24)]
    assert loop == [False] * 10 + [True] * 14  # frames that come again in turns
    never = Feed(frozen_frames=0, jumps=True)
    assert not any(never.look(camera(SCENE, seed // 20))[0] for seed in range(40))


def test_without_any_noise_a_still_scene_is_not_told_from_a_frozen_camera() -> None:
    feed = Feed(frozen_frames=5, jumps=True)
    assert not any(feed.look(camera(SCENE, 0))[0] for _ in range(20))
