"""Command-line flags made from settings, so that every command has all of them."""

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from apt_ray.config import BackboneSpec, FitSettings, Flag, Settings, SomeSettings
from apt_ray.errors import SettingsError

Number = TypeVar("Number", int, float)


def add_flags(
    parser: argparse._ActionsContainer,
    settings: type[Settings],
    *,
    prefix: str,
    without: Collection[str] = (),
) -> None:
    """Add one flag for each field of `settings`, with its description and default.

    Several numbers are separated by commas or spaces.

    Args:
        parser: a parser or a group of one.
        settings: whose fields; a flag that is not given leaves the default. A `Flag` in a field's
            annotation says how it is spelt.
        prefix: of the names in the parsed options, for `given`.
        without: fields that get no flag.
    """
    for name, field in settings.model_fields.items():
        if name in without:
            continue
        spelling = next((part for part in field.metadata if isinstance(part, Flag)), Flag())
        flags = spelling.names or (f"--{name.replace('_', '-')}",)
        kind = field.annotation
        kinds = [kind, *get_args(kind)]
        text = _help(field)
        if bool in kinds:
            parser.add_argument(
                *flags, dest=prefix + name, action=argparse.BooleanOptionalAction, help=text
            )
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else _choices(field)
        metavar = None if choices else spelling.metavar or flags[0].split("-")[-1].upper()
        if any(get_origin(part) is tuple for part in kinds):
            parser.add_argument(
                *flags,
                dest=prefix + name,
                type=integers,
                nargs="+",
                action=_Joined,
                metavar=metavar,
                help=text,
            )
            continue
        plain = next((part for part in (int, float) if part in kinds), str)
        older = dict(spelling.older)
        parser.add_argument(
            *flags,
            dest=prefix + name,
            type=partial(_newer, older) if older else type(choices[0]) if choices else plain,
            choices=choices,
            metavar=metavar,
            help=text,
        )


def _newer(older: Mapping[str, str], text: str) -> str:
    return older.get(text, text)


def _help(field: FieldInfo) -> str:
    """A field's description and its default, unless that is None, which the description tells."""
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    shown = field.description if default is None else f"{field.description} ({default})"
    return str(shown).replace("%", "%%")


def _choices(field: FieldInfo) -> list[Any] | None:
    """The values that a field's schema enumerates, if it does."""
    schema = field.json_schema_extra
    values = schema.get("enum") if isinstance(schema, dict) else None
    return values if isinstance(values, list) else None


def number(
    kind: type[Number], *, least: float = 0, most: float | None = None
) -> Callable[[str], Number]:
    """How argparse reads a number: finite, within its bounds, both of which are included."""

    def read(text: str) -> Number:
        value = kind(text)
        if not (least <= value < math.inf and (most is None or value <= most)):
            bounds = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it for what is no number at all
    return read


count = number(int, least=1)


def integers(text: str) -> list[int]:
    """Numbers of at least 0 between commas, as argparse reads them."""
    read = number(int)
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1,2") from None


def seeds(text: str) -> list[int]:
    """Seeds between commas, as argparse reads them: each once."""
    found = integers(text)
    for seed in found:
        try:
            FitSettings.parse({"seed": seed})
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} holds a seed twice: each counts once")
    return found


class _Joined(argparse.Action):
    """Stores several lists as one tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        values: str | Sequence[Any] | None,
        flag: str | None = None,
    ) -> None:
        setattr(options, self.dest, tuple(one for part in values or () for one in part))


def add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the frozen vision-language model; `given_backbone` reads them."""
    group = parser.add_argument_group("backbone", "the frozen vision-language model")
    add_flags(group, BackboneSpec, prefix="backbone_")


def given(
    options: argparse.Namespace, settings: type[SomeSettings], *, prefix: str, **others: Any
) -> SomeSettings:
    """The settings that flags of `add_flags` gave; SettingsError for a value out of range.

    Args:
        options: as parsed.
        settings: as given to `add_flags`.
        prefix: as given to `add_flags`.
        others: values of fields that have no flag.
    """
    found = {name: getattr(options, prefix + name, None) for name in settings.model_fields}
    known = {name: value for name, value in found.items() if value is not None}
    return settings.parse(known | others)


def given_backbone(options: argparse.Namespace) -> BackboneSpec:
    """The backbone that flags of `add_backbone_flags` chose."""
    return given(options, BackboneSpec, prefix="backbone_")
