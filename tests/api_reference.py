"""docs/api.md: the public names, as their own docstrings describe them.

`python -m tests.api_reference docs/api.md` writes it.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import griffe
from pydantic.fields import FieldInfo

import apt_ray

_ROOT = Path(apt_ray.__file__).resolve().parents[1]
_WIDTH = 96
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TITLES = {
    "parameters": "Arguments",
    "attributes": "Attributes",
    "returns": "Returns",
    "raises": "Raises",
}


def reference() -> str:
    """All of it, as Markdown."""
    package = griffe.load("apt_ray", search_paths=[_ROOT], docstring_parser="google")
    described = [name for name in apt_ray.__all__ if apt_ray._HOME[name] != "errors"]
    parts = [
        "# The Python interface",
        "What `import apt_ray` offers. Letters name the axes of tensors and arrays: B images, N"
        " patch tokens, E width of the joint space, T texts, P prompts, L vectors of a context, C"
        " their width, H and W pixels. A `StrPath` is text or any path-like object, an `AnyPath`"
        " may also lie in S3 (`s3://bucket/key`), and a `Location` is what they are read as.",
        *(part for name in described for part in _describe(package, name)),
        "## Errors",
        *_errors(package["errors"]),
    ]
    return "\n\n".join(parts) + "\n"


def _describe(package: griffe.Module, name: str) -> Iterator[str]:
    described, offered = package[f"{apt_ray._HOME[name]}.{name}"], getattr(apt_ray, name)
    fields: dict[str, FieldInfo] = getattr(offered, "model_fields", {})
    explained = [key for key, field in fields.items() if field.description]
    yield f"## {name}"
    if fields and not explained:
        arguments = ", ".join(f"{key}: {described[key].annotation}" for key in fields)
        yield _code(f"{name}(*, {arguments})")
    elif not fields and not getattr(offered, "_is_protocol", False):
        yield _code(described.signature())
    yield from _text(described)
    if explained:
        yield "Fields:"
        yield "\n".join(_field(package, described[key], fields[key]) for key in explained)
    if described.is_class:
        members = [member for member in described.all_members.values() if _is_shown(member)]
        if members:
            yield "Methods and properties:"
            yield "\n".join(map(_member, members))


def _is_shown(member: griffe.Object | griffe.Alias) -> bool:
    return member.is_public and member.has_docstring and not member.is_special


def _text(described: griffe.Object) -> Iterator[str]:
    """The paragraphs and lists of its docstring."""
    assert described.docstring is not None, f"{described.path} lacks a docstring"
    for section in described.docstring.parse("google", warnings=False):
        if section.kind.value == "text":
            yield section.value
        else:
            yield f"{_TITLES[section.kind.value]}:"
            yield "\n".join(map(_item, section.value))


def _item(item: griffe.DocstringElement) -> str:
    label = getattr(item, "name", "")
    if isinstance(item, griffe.DocstringRaise):
        label = item.annotation
    elif label.endswith(","):  # of "x, y: both" it takes the first for the name
        label = f"{label} {item.annotation}"
    text = " ".join(item.description.split())
    return f"- `{label}`: {text}" if label else f"- {text}"


def _field(package: griffe.Module, described: griffe.Attribute, field: FieldInfo) -> str:
    kind = described.annotation
    if isinstance(kind, griffe.ExprSubscript) and str(kind.left) == "Annotated":
        kind = kind.slice.elements[0]
    if isinstance(kind, griffe.ExprName) and kind.canonical_path.startswith("apt_ray."):
        kind = package[kind.canonical_path.removeprefix("apt_ray.")].value
    default = "" if field.is_required() else f" = {field.default!r}"
    bounds = [
        f"{sign} {getattr(bound, key)}"
        for bound in field.metadata
        for key, sign in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    limits = f" ({', '.join(bounds)})" if bounds else ""
    return f"- `{described.name}: {kind}{default}`{limits}: {field.description}"


def _member(member: griffe.Object | griffe.Alias) -> str:
    own = member.final_target if isinstance(member, griffe.Alias) else member
    head = own.signature() if own.is_function else f"{own.name}: {own.annotation}"
    text = "\n\n".join(_text(own))
    return indent(f"- `{head}`: {text}", "  ").removeprefix("  ")


def _errors(errors: griffe.Module) -> Iterator[str]:
    """What the module's docstring says, a drawn tree in it."""
    first, _, tree = inspect.cleandoc(errors.docstring.value).partition("\n\n")
    yield first
    yield f"```text\n{tree}\n```"


def _code(signature: str) -> str:
    """In a block of its own, one argument a line where they do not fit into one."""
    if len(signature) > _WIDTH:
        head, _, rest = signature.partition("(")
        arguments, depth = [""], 0
        while (depth := depth + (rest[0] in "([{") - (rest[0] in ")]}")) >= 0:
            if depth == 0 and rest[0] == ",":
                arguments.append("")
            else:
                arguments[-1] += rest[0]
            rest = rest[1:]
        lines = "".join(f"    {argument.strip()},\n" for argument in arguments)
        signature = f"{head}(\n{lines}{rest}"
    return f"```python\n{signature}\n```"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
