"""What the search varies: settings of FitSettings and of the reference encoder, with their ranges.

A file with another space is YAML, one setting a line:

    context_length: {low: 2, high: 16}
    noise_strength: {choices: [0.1, 0.3, 0.6]}
    reference_input_size: {choices: [256, 320, 448]}
    reference_layers: {choices: ["2,4", "3,4"]}
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from apt_ray.config import (
    NOISE_LADDER,
    TRUNK,
    TRUNK_INPUT_SIZE,
    TRUNK_POOL,
    TRUNK_STAGES,
    BackboneSpec,
    FitSettings,
    Settings,
)
from apt_ray.errors import SettingsError
from apt_ray.settings_file import read_settings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_NOT_SEARCHED = {
    "steps": "the search has a flag for it",
    "seed": "the search has a flag for it",
    "ground": "the search has a flag for it",
    "white_level": "the search has a flag for it",
    "false_alarm_rate": "a threshold changes no ranking, which is what trials are judged by",
}

REFERENCE = ("reference_input_size", "reference_layers", "reference_lengths", "reference_pool")
"""Settings of the backbone that can be searched: what the memory reads. Prompts and their banks
are the same whatever they are."""

REMEMBERED = ("reference_copies", "reference_rotations", "reference_size")
"""Settings of a fit that make another memory."""


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

    def holds(self, value: Any) -> bool:
        """Whether it is one of the values."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and (self.low or 0) <= value <= (self.high or 0)

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

PROMPT_SPACE: Space = MappingProxyType(
    {
        "context_length": Axis(low=2, high=16),
        "noise_strength": Axis(choices=NOISE_LADDER),
        "smgs_weight": Axis(low=0.0, high=1.0),
        "learning_rate": Axis(low=0.003, high=0.3, log=True),
    }
)
"""What is searched by default whatever the memory reads."""

TRUNK_SPACE: Space = MappingProxyType(
    {
        "reference_input_size": Axis(choices=(256, 320, 384, 448)),
        "reference_layers": Axis(choices=("2,4", "3,4", "4")),
        "reference_lengths": Axis(choices=(True, False)),
        "reference_weight": Axis(choices=(0.7, 0.85, 1.0)),
    }
)
"""What is searched by default beside it where the memory reads the trunk."""


def default_space(backbone: BackboneSpec) -> Space:
    """What is searched unless told otherwise."""
    return {**PROMPT_SPACE, **(TRUNK_SPACE if backbone.reads == TRUNK else {})}


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
    """SettingsError if a setting does not exist, cannot take the values, or cannot matter."""
    searchable = sorted(set(FitSettings.model_fields) - set(_NOT_SEARCHED)) + list(REFERENCE)
    for name, axis in space.items():
        if name not in searchable:
            why = f" ({_NOT_SEARCHED[name]})" if name in _NOT_SEARCHED else ""
            raise SettingsError(
                f"{name} cannot be searched{why}: choose among {', '.join(searchable)}"
            )
        if not axis.choices and name in (*REFERENCE, *REMEMBERED):
            raise SettingsError(
                f"each value of {name} is encoded anew: list those to try, as {{choices: [...]}}"
            )
        if not axis.choices and FitSettings.model_fields[name].annotation not in (int, float):
            raise SettingsError(f"{name} is no number: list its values, as {{choices: [...]}}")
        for value in axis.probes:
            (BackboneSpec if name in REFERENCE else FitSettings).parse({name: value})


def distributions(space: Space) -> "dict[str, BaseDistribution]":
    """Setting -> Optuna's distribution."""
    return {name: axis.distribution(is_integer=_is_integer(name)) for name, axis in space.items()}


def _is_integer(name: str) -> bool:
    return name in FitSettings.model_fields and FitSettings.model_fields[name].annotation is int


def starting_point(space: Space, backbone: BackboneSpec) -> dict[str, Any]:
    """The settings that hold where nothing is searched: the first trial, which all others are held
    against."""
    return point_of(space, FitSettings(), backbone)


def point_of(space: Space, settings: FitSettings, backbone: BackboneSpec) -> dict[str, Any]:
    """What a fit with these settings has of each that is searched, as the space says it."""
    point = settings.model_dump(include=set(space))
    known: dict[str, Any] = {"reference_lengths": backbone.reference_lengths}
    if backbone.reads == TRUNK:
        layers = backbone.reference_layers or TRUNK_STAGES
        known |= {
            "reference_input_size": backbone.reference_input_size or TRUNK_INPUT_SIZE,
            "reference_layers": ",".join(map(str, layers)),
            "reference_pool": backbone.reference_pool or TRUNK_POOL,
        }
    for name in set(space) & set(REFERENCE):
        value = known.get(name, getattr(backbone, name))
        point[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return point
