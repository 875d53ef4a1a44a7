"""The bill of materials names what no Python package does."""

import hashlib
import json
from pathlib import Path

import pytest

from apt_ray.devtools.bill_of_materials import main

ROOT = Path(__file__).resolve().parents[2]


def test_what_others_made_is_named_once_with_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    numpy = {"type": "library", "bom-ref": "numpy==2", "name": "numpy", "version": "2"}
    path.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [numpy]}))
    for _ in range(2):
        assert main([str(path)]) == 0
    first, *added = json.loads(path.read_text())["components"]
    assert first == numpy
    vendor = ROOT / "serving" / "console" / "vendor"
    files = {f"console/{p.relative_to(vendor)}" for p in vendor.glob("*/*") if p.name != "LICENSE"}
    assert {component["bom-ref"] for component in added} == files | {"weights/apt-mini.safetensors"}
    for component in added:
        place, _, name = component["bom-ref"].partition("/")
        folder = vendor if place == "console" else ROOT / "apt_ray" / "features" / "builtin"
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert component["hashes"] == [{"alg": "SHA-256", "content": digest}]
        assert component["version"]
        assert component["licenses"][0]["license"]["id"] in {"MIT", "Apache-2.0", "OFL-1.1"}


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name in ("list.json", "none.json"):
        assert main([str(tmp_path / name)]) == 1
        assert "is no bill of materials" in capsys.readouterr().err
