"""apt_ray.text: what people read."""

import pytest

from apt_ray.text import duration, printable


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.4, "3 s"), (200, "3 min"), (9000, "2.5 h"), (0, "0 s")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_no_terminal_takes_is_escaped() -> None:
    assert printable("a\n\udcff.png") == "a\\n\\udcff.png"
