"""Files of settings: YAML in which nothing that was written gets lost or changes its meaning."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from apt_ray.errors import SettingsError

_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


def read_settings(path: Path, what: str) -> Any:
    """The plain values in a YAML file, None if it is empty.

    Args:
        what: the file is, for messages.

    Raises:
        SettingsError: The file cannot be read, is no YAML, names a key twice, or has a key that
            YAML takes for a number, a date or a truth value.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506 - a safe one
    except UnicodeDecodeError as error:
        reason = f"{error.reason}, save it as UTF-8"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error)
    raise SettingsError(f"cannot read the {what} {path}: {reason}")


class _Loader(yaml.SafeLoader):
    """YAML's own rules keep the last of two equal keys, and read `no`, `0123` and `2024-05-01` as
    False, 83 and a date."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            name = key.value
            if key.tag != _TEXT:
                raise _refused(f"the key {name} is no text to YAML: quote it, '{name}'", key)
            if name in seen:
                raise _refused(f"{name} stands there twice: keep one of them", key)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _refused(why: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)
