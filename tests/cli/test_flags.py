"""Flags that are made from settings."""

import argparse
from typing import Annotated, Literal

import pytest
from pydantic import Field

from apt_ray.cli.flags import add_flags, given, number
from apt_ray.config import Flag, Settings
from apt_ray.errors import SettingsError


class Sorting(Settings):
    """Settings of every kind."""

    speed: int = Field(default=3, ge=1, description="Parts a second.")
    arm: Literal["left", "right"] = Field(default="left", description="The arm that sorts.")
    is_gentle: bool = Field(default=True, description="Whether parts are laid down.")
    side: Annotated[Literal["up", "down"], Flag(older=(("top", "up"),))] = Field(
        default="down", description="Which side lies up."
    )
    bins: Annotated[tuple[int, ...], Flag(names=("--boxes", "--bins"), metavar="N")] = Field(
        default=(1, 2), description="Where 100% of the parts go."
    )
    name: str | None = Field(default=None, description="What the sorter is called.")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sorting, prefix="sort_", without={"name"})
    return parser


def read(*arguments: str, **others: object) -> Sorting:
    return given(parser().parse_args(arguments), Sorting, prefix="sort_", **others)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", Sorting()),
        ("--speed 2 --arm right --no-is-gentle", Sorting(speed=2, arm="right", is_gentle=False)),
        ("--side top", Sorting(side="up")),
        ("--boxes 3,4", Sorting(bins=(3, 4))),
        ("--bins 3 4", Sorting(bins=(3, 4))),
    ],
)
def test_flags_give_settings(arguments: str, expected: Sorting) -> None:
    assert read(*arguments.split()) == expected


def test_fields_without_a_flag_are_given_beside() -> None:
    assert read("--speed", "2", name="A") == Sorting(speed=2, name="A")
    with pytest.raises(SystemExit):
        read("--name", "A")


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(SettingsError, match="speed"):
        read("--speed", "0")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "9.5", "1e400", "ten", ""])
def test_a_number_is_finite_and_within_its_bounds(text: str) -> None:
    alone = argparse.ArgumentParser()
    alone.add_argument("--days", type=number(float, most=9))
    assert alone.parse_args(["--days", "9"]).days == 9.0
    assert alone.parse_args(["--days", "0"]).days == 0.0
    with pytest.raises(SystemExit, match="2"):
        alone.parse_args([f"--days={text}"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_setting_is_without_end(value: str) -> None:
    class Pace(Settings):
        seconds: float = Field(default=1, description="A part.")

    flags = argparse.ArgumentParser()
    add_flags(flags, Pace, prefix="")
    with pytest.raises(SettingsError, match="seconds: Input should be a finite number"):
        given(flags.parse_args([f"--seconds={value}"]), Pace, prefix="")


def test_the_help_is_that_of_the_fields() -> None:
    shown = " ".join(parser().format_help().split())
    assert "--boxes N [N ...], --bins N [N ...] Where 100% of the parts go. (1,2)" in shown
    assert "--speed SPEED Parts a second. (3)" in shown
