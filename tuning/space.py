"""What the search varies: settings of FitSettings, with their ranges.

A file with another space is YAML, one setting a line:

    context_length: {low: 2, high: 16}
    noise_strength: {choices: [0.1, 0.3, 0.6]}
    learning_rate: {low: 0.003, high: 0.3, log: true}
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from apt_ray.config import NOISE_LADDER, FitSettings, Settings
from apt_ray.errors import SettingsError
from apt_ray.settings_file import read_settings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_NOT_SEARCHED = {"steps", "seed"}


class Axis(Settings):
    """The values of one setting: a range, both ends included, or a choice."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[int | float | str | bool, ...] | None = None

    @model_validator(mode="after")
    def _is_range_or_choice(self) -> "Axis":
        is_range = self.low is not None and self.high is not None and self.low < self.high
        if is_range == bool(self.choices):
            raise ValueError("give either low and high, low below high, or choices")
        if self.log and not (self.low is not None and self.low > 0):
            raise ValueError("a logarithmic range begins above 0")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that are valid settings if all are."""
        return self.choices or (self.low, self.high)

    @property
    def probes(self) -> tuple[Any, ...]:
        """The same, and of a range of fractions one between: a ladder does not take them all."""
        low, high = self.low, self.high
        if low is None or high is None or (isinstance(low, int) and isinstance(high, int)):
            return self.ends
        return (low, low + (high - low) / 2.1, high)  # the very middle may be a rung by chance

    def distribution(self, *, is_integer: bool) -> "BaseDistribution":
        """The same as Optuna says it."""
        from optuna import distributions as d

        if self.choices:
            return d.CategoricalDistribution(self.choices)
        low, high = self.low or 0, self.high or 0
        if is_integer:
            return d.IntDistribution(int(low), int(high), log=self.log)
        return d.FloatDistribution(float(low), float(high), log=self.log)


Space = Mapping[str, Axis]

DEFAULT_SPACE: Space = MappingProxyType(
    {
        "context_length": Axis(low=2, high=16),
        "noise_strength": Axis(choices=NOISE_LADDER),
        "smgs_weight": Axis(low=0.0, high=1.0),
        "learning_rate": Axis(low=0.003, high=0.3, log=True),
    }
)


def read_space(path: Path) -> Space:
    """The space in a file; SettingsError says what is wrong with it."""
    content = read_settings(path, "search space")
    if not isinstance(content, dict) or not content:
        raise SettingsError(
            f"{path} names no setting, write for example `smgs_weight: {{low: 0, high: 1}}`"
        )
    space = {name: Axis.parse(values or {}) for name, values in content.items()}
    check_space(space)
    return space


def check_space(space: Space) -> None:
    """SettingsError if a setting does not exist or cannot take the values."""
    searchable = sorted(set(FitSettings.model_fields) - _NOT_SEARCHED)
    for name, axis in space.items():
        if name not in searchable:
            raise SettingsError(f"{name} cannot be searched: choose among {', '.join(searchable)}")
        if not axis.choices and FitSettings.model_fields[name].annotation not in (int, float):
            raise SettingsError(f"{name} is no number: list its values, as {{choices: [...]}}")
        for value in axis.probes:
            FitSettings.parse({name: value})


def distributions(space: Space) -> "dict[str, BaseDistribution]":
    """Setting -> Optuna's distribution."""
    return {
        name: axis.distribution(is_integer=FitSettings.model_fields[name].annotation is int)
        for name, axis in space.items()
    }


def starting_point(space: Space) -> dict[str, Any]:
    """The default settings: the first trial, so that no search ends below them unknowingly."""
    return FitSettings().model_dump(include=set(space))
