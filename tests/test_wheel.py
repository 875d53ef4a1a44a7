"""The wheel: what it holds, and that its core works where nothing else is installed."""

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Outside of the core.
OPTIONAL = ("ray", "mlflow", "optuna", "sklearn", "matplotlib", "fastapi", "boto3", "psycopg2")


def run(*command: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    # Nothing of the checkout is on the path, nor taken for installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)


def pip(python: Path | str, *arguments: str | Path) -> None:
    done = run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("apt_ray", "tuning", "serving", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_three_packages_and_no_more(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "apt_ray",
        "tuning",
        "serving",
    }
    assert not [name for name in names if name.startswith(("apt_ray/dev", "apt_ray/pretraining"))]


def test_it_is_typed_and_holds_what_is_read_at_run_time(wheel: Path) -> None:
    assert {
        "apt_ray/py.typed",
        "tuning/py.typed",
        "serving/py.typed",
        "apt_ray/features/builtin/apt-mini.safetensors",
        "apt_ray/features/builtin/LICENSE-WEIGHTS",
        "serving/console/index.html",
        "serving/console/pages/fleet.js",
        "serving/console/style/base.css",
        "serving/console/vendor/preact/LICENSE",
        "serving/console/vendor/inter/inter.woff2",
        "serving/dashboard.json",
        "serving/fleet.yaml",
    } <= set(ZipFile(wheel).namelist())


def install(python: Path, package: str | Path) -> None:
    # Most of what is installed is never imported, and need not be compiled.
    pip(python, "install", "--no-compile", "--constraint", ROOT / "constraints.txt", package)


@pytest.fixture
def commands(wheel: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of the commands of an environment with the core alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    install(tmp_path / "venv" / "bin" / "python", wheel)
    yield tmp_path / "venv" / "bin"
    shutil.rmtree(tmp_path / "venv")  # over a gigabyte, which pytest would keep


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_core_alone_fits_inspects_and_evaluates(commands: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    def use(command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run(commands / command, *arguments, cwd=empty)

    def succeeds(*command: str) -> str:
        done = use(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = f"import importlib.util as u; print([n for n in {OPTIONAL} if u.find_spec(n)])"
    assert succeeds("python", "-c", found) == "[]\n"

    def refuses(command: Sequence[str], message: str) -> None:
        done = use(*command)
        assert done.returncode == 1
        assert done.stderr.endswith(f"{message}\n"), done.stderr

    quick = ("--shots", "2", "--steps", "5")
    fit = ("apt-ray", "fit", "--data", "data/washer", "--out", "washer.safetensors", *quick)
    inspect = ("apt-ray", "inspect", "washer.safetensors", "data/washer/test/scratch")
    evaluate = ("apt-ray", "evaluate", "--data", "data", "--categories", "washer", *quick)
    succeeds("apt-ray", "--version")
    succeeds("apt-ray", "sample", "--out", "data")
    succeeds(*fit)
    assert "ANOMALOUS" in succeeds(*inspect)
    assert "| washer | 2 | both |" in succeeds(*evaluate, "--seeds", "0")

    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copy(next((empty / "data/washer/test/good").iterdir()), empty / "part.png")
    assert succeeds("python", "-c", snippet).startswith(("True ", "False "))

    refuses([*evaluate, "--report", "page"], "pip install 'apt-ray[report]'")
    refuses([*fit, "--data", "s3://bucket/washer"], "pip install 'apt-ray[s3]'")
    refuses(["apt-ray", "registry", "history", "washer"], "pip install 'apt-ray[registry]'")
    refuses(["python", "-m", "tuning.search", "--data", "data"], "pip install 'apt-ray[tune]'")
    refuses(["python", "-m", "serving.fleet", "status"], "pip install 'apt-ray[serve]'")
    # What is said is right: the extra brings what was missing.
    install(commands / "python", "apt-ray[s3]")
    succeeds("python", "-c", "import boto3")
