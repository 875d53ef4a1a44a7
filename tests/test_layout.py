"""What holds of the repository as a whole, beyond the import rules in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports every module of apt_ray where Ray is not to be had.
IMPORT_WITHOUT_RAY = """
import importlib, pkgutil, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
import apt_ray
for module in pkgutil.walk_packages(apt_ray.__path__, "apt_ray."):
    importlib.import_module(module.name)
    print(module.name)
"""


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_core_imports_without_ray() -> None:
    imported = python("-c", IMPORT_WITHOUT_RAY)
    assert imported.returncode == 0, imported.stderr
    assert {"apt_ray.detection.detector", "apt_ray.registry", "apt_ray.devtools.demo"} <= set(
        imported.stdout.split()
    )


def test_the_registry_is_imported_without_mlflow() -> None:
    imported = python("-c", "import sys, apt_ray.registry; assert 'mlflow' not in sys.modules")
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "apt_ray"),
        ("-m", "apt_ray", "fit"),
        ("-m", "apt_ray", "inspect"),
        ("-m", "apt_ray", "evaluate"),
        ("-m", "apt_ray", "sample"),
        ("-m", "apt_ray", "registry"),
        ("-m", "apt_ray", "registry", "promote"),
        ("-m", "apt_ray.devtools.demo"),
        ("tuning/search.py",),
        ("-m", "serving.fleet"),
        ("-m", "serving.fleet", "deploy"),
        ("-m", "serving.fleet", "render"),
    ],
    ids=" ".join,
)
def test_help_explains_the_command(command: tuple[str, ...]) -> None:
    # As under `ray job submit`, the repository itself is on the path, installed or not.
    shown = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: ")
    assert shown.stderr == ""


def test_console_scripts_are_installed_and_work() -> None:
    scripts = [
        entry.name
        for entry in distribution("apt-ray").entry_points
        if entry.group == "console_scripts"
    ]
    assert scripts == ["apt-ray"]
    script = shutil.which("apt-ray", path=str(Path(sys.executable).parent))
    assert script is not None, "install the package: pip install -e '.[dev]'"
    subprocess.run([script, "--help"], capture_output=True, check=True)
