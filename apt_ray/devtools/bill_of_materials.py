"""Completes a CycloneDX bill of materials by what no Python package names: the console's modules of
others, as `serving/console/vendor/README.md` lists them, and the built-in weights."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apt_ray.errors import AptError, DataError
from apt_ray.features.weights import builtin_weights
from apt_ray.files import file_sha256, write_json
from apt_ray.version import __version__

_VENDOR = Path(__file__).parents[2] / "serving" / "console" / "vendor"
_ROW = re.compile(
    r"^\| `(?P<file>[^`]+)` \| (?P<name>\S+) (?P<version>[\d.]+), `[^`]+` \| (?P<licence>[^,]+),",
    re.MULTILINE,
)


def main(argv: list[str] | None = None) -> int:
    """Complete one file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_ray.devtools.bill_of_materials", description=__doc__
    )
    parser.add_argument("file", type=Path, help="CycloneDX in JSON, as `cyclonedx-py` writes it")
    path = parser.parse_args(argv).file
    try:
        complete(path)
    except AptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def complete(path: Path) -> None:
    """Add the components to the file; once is enough. DataError if it is no bill of materials."""
    try:
        bill: dict[str, Any] = json.loads(path.read_text())
        components: list[dict[str, Any]] = bill["components"]
        known = {component["bom-ref"] for component in components}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no bill of materials ({error}): run `make sbom`") from error
    components += [one for one in _components() if one["bom-ref"] not in known]
    write_json(path, bill)


def _components() -> Iterator[dict[str, Any]]:
    for row in _ROW.finditer((_VENDOR / "README.md").read_text()):
        yield {
            "type": "library",
            "bom-ref": f"console/{row['file']}",
            "name": row["name"],
            "version": row["version"],
            "description": f"serving/console/vendor/{row['file']}",
            "licenses": [{"license": {"id": row["licence"]}}],
            "hashes": [{"alg": "SHA-256", "content": file_sha256(_VENDOR / row["file"])}],
            "purl": f"pkg:npm/{row['name'].replace('@', '%40')}@{row['version']}",
        }
    weights = builtin_weights()
    yield {
        "type": "machine-learning-model",
        "bom-ref": f"weights/{weights.path.name}",
        "name": weights.path.stem,
        "version": __version__,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "hashes": [{"alg": "SHA-256", "content": weights.sha256}],
    }


if __name__ == "__main__":
    sys.exit(main())
