"""Command-line flags made from settings, so that every command has all of them."""

import argparse
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from apt_ray.config import BackboneSpec, Settings, SomeSettings


def add_flags(
    parser: argparse._ActionsContainer,
    settings: type[Settings],
    *,
    prefix: str,
    without: Collection[str] = (),
) -> None:
    """Add one flag for each field of `settings`, with its description and default.

    Args:
        parser: a parser or a group of one.
        settings: whose fields; a flag that is not given leaves the default.
        prefix: of the names in the parsed options, for `given`.
        without: fields that get no flag.
    """
    for name, field in settings.model_fields.items():
        if name in without:
            continue
        flag, kind = f"--{name.replace('_', '-')}", field.annotation
        kinds = [kind, *get_args(kind)]
        text = f"{field.description} ({field.default})".replace("%", "%%")
        if bool in kinds:
            parser.add_argument(
                flag, dest=prefix + name, action=argparse.BooleanOptionalAction, help=text
            )
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else _choices(field)
        is_several = any(get_origin(part) is tuple for part in kinds)
        number = next((part for part in (int, float) if part in kinds), str)
        parser.add_argument(
            flag,
            dest=prefix + name,
            type=type(choices[0]) if choices else int if is_several else number,
            choices=choices,
            nargs="+" if is_several else None,
            metavar=None if choices else name.split("_")[-1].upper(),
            help=text,
        )


def _choices(field: FieldInfo) -> list[Any] | None:
    """The values that a field's schema enumerates, if it does."""
    schema = field.json_schema_extra
    values = schema.get("enum") if isinstance(schema, dict) else None
    return values if isinstance(values, list) else None


def add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the frozen vision-language model; `given_backbone` reads them."""
    group = parser.add_argument_group("backbone", "the frozen vision-language model")
    group.add_argument(
        "--backbone",
        dest="backbone_name",
        metavar="NAME",
        help="'builtin', or a CLIP ViT of open_clip, e.g. ViT-B-16 (builtin)",
    )
    add_flags(group, BackboneSpec, prefix="backbone_", without={"name"})


def given(
    options: argparse.Namespace, settings: type[SomeSettings], *, prefix: str
) -> SomeSettings:
    """The settings that flags of `add_flags` gave; SettingsError for a value out of range."""
    found = {name: getattr(options, prefix + name, None) for name in settings.model_fields}
    return settings.parse({name: value for name, value in found.items() if value is not None})


def given_backbone(options: argparse.Namespace) -> BackboneSpec:
    """The backbone that flags of `add_backbone_flags` chose."""
    return given(options, BackboneSpec, prefix="backbone_")
