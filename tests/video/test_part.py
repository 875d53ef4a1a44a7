import numpy as np
import pytest
from PIL import Image, ImageDraw

from apt_ray.video.changes import small_frame
from apt_ray.video.part import PartView


def frame(*discs: tuple[float, float, float], seed: int = 0) -> Image.Image:
    """Bright discs (x, y, radius, as shares of the frame) on a dark ground."""
    image = Image.new("RGB", (200, 200), (40, 42, 45))
    for x, y, radius in discs:
        box = [200 * (x - radius), 200 * (y - radius), 200 * (x + radius), 200 * (y + radius)]
        ImageDraw.Draw(image).ellipse(box, fill=(190, 180, 170))
    noise = np.random.default_rng(seed).normal(0, 5, (200, 200, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


GOOD = [frame((0.5 + dx, 0.5, 0.3), seed=place) for place, dx in enumerate((0, 0.03, -0.04))]


@pytest.mark.parametrize(
    ("discs", "is_whole"),
    [
        ([(0.5, 0.5, 0.3)], True),
        ([(0.6, 0.45, 0.3)], True),  # anywhere, if it is whole
        ([(0.8, 0.5, 0.3)], False),  # cut by the edge
        ([], False),
        ([(0.5, 0.5, 0.15)], False),  # a smaller thing
        ([(0.5, 0.5, 0.3), (1.1, 0.5, 0.3)], False),  # the next one is in view
        ([(0.3, 0.3, 0.3), (0.7, 0.7, 0.3)], False),
    ],
)
def test_a_whole_part_is_told_from_what_is_none(
    discs: list[tuple[float, float, float]], is_whole: bool
) -> None:
    view = PartView.of(GOOD)
    assert view is not None
    assert view.is_in(small_frame(frame(*discs, seed=9))) is is_whole
    assert PartView.model_validate_json(view.model_dump_json()) == view


def test_surfaces_and_cut_parts_show_no_whole_part() -> None:
    texture = [Image.effect_noise((200, 200), 60).convert("RGB") for _ in range(3)]
    assert PartView.of(texture) is None
    assert PartView.of([frame((0.9, 0.5, 0.3), seed=seed) for seed in range(3)]) is None
    assert PartView.of([Image.new("RGB", (200, 200), "gray")]) is None
    assert PartView.of([]) is None
