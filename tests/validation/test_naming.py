import pytest

from apt_ray.validation.naming import Named, format_confusion


def named(seed: int, *pairs: tuple[str, str]) -> Named:
    return Named(category="nut", seed=seed, examples=2, pairs=pairs)


def test_every_kind_weighs_the_same() -> None:
    one = named(0, *[("pit", "pit")] * 9, ("pit", "crack"), ("crack", "pit"))
    assert one.right("pit") == pytest.approx(0.9)
    assert one.balanced_accuracy == pytest.approx(0.45)


def test_the_table_says_what_is_taken_for_what() -> None:
    said = format_confusion(
        [named(0, ("pit", "pit"), ("crack", "pit")), named(1, ("pit", "pit"), ("crack", "crack"))]
    )
    assert "75.0% right in the mean of the kinds, by chance 50.0%" in said
    assert "| 1 crack | 1 | 1 | 50 % |" in said
    assert "| 2 pit | 0 | 2 | 100 % |" in said


def test_long_names_make_no_line_that_fits_on_no_screen() -> None:
    kinds = [f"{number}{'x' * 63}" for number in range(10)]
    said = format_confusion([named(0, *((kind, kind) for kind in kinds))])
    _, _, *table = said.splitlines()
    assert len(table) == 12
    assert max(map(len, table)) < 64 + 10 * 4 + 20
