"""What works without the libraries of the extras, and what is said where it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from apt_ray.errors import AptError, MissingDependencyError
from apt_ray.optional import require

ROOT = Path(__file__).resolve().parents[1]

# As in an environment where only the core is installed.
WITHOUT_EXTRAS = """
import sys
for name in ("ray", "mlflow", "boto3", "botocore", "matplotlib", "fastapi", "starlette",
             "python_multipart", "optuna", "sklearn", "pyarrow", "pandas", "psycopg2",
             "onnx", "onnxscript", "onnxruntime", "openvino", "av"):
    sys.modules[name] = None  # imports of it raise ModuleNotFoundError
"""

IMPORT_ALL = """
import importlib, pkgutil
import apt_ray

def walk(package):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name in ("apt_ray.devtools", "apt_ray.pretraining"):
            continue
        try:
            imported = importlib.import_module(module.name)
        except apt_ray.errors.MissingDependencyError as error:
            print(module.name, "|", error)
            continue
        print(module.name)
        if module.ispkg:
            walk(imported)

import apt_ray.errors
walk(apt_ray)
"""


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    require("torch", "numpy", extra="none")
    with pytest.raises(MissingDependencyError) as raised:
        require("torch", "no_such_module", "nor_this", extra="some")
    assert str(raised.value) == "this needs no_such_module, nor_this: pip install 'apt-ray[some]'"
    assert isinstance(raised.value, AptError)
    assert isinstance(raised.value, ImportError)


def test_the_core_imports_without_the_extras() -> None:
    imported = python(IMPORT_ALL)
    assert imported.returncode == 0, imported.stderr
    lines = imported.stdout.splitlines()
    assert {"apt_ray.prompts.fit", "apt_ray.detection.detector", "apt_ray.cli.main"} <= {*lines}
    refused = dict(line.split(" | ") for line in lines if "|" in line)
    assert refused == {
        "apt_ray.registry.mlflow": "this needs mlflow: pip install 'apt-ray[registry]'",
        "apt_ray.validation.report": "this needs matplotlib: pip install 'apt-ray[report]'",
    }


CLI = "from apt_ray.cli.main import main; sys.exit(main())"
SEARCH = "from tuning.search import main; sys.exit(main())"
FLEET = "from serving.fleet import main; sys.exit(main())"
TUNE = "this needs ray, optuna, sklearn, pyarrow, mlflow, matplotlib: pip install 'apt-ray[tune]'"
SERVE = "this needs ray, fastapi, python_multipart, mlflow: pip install 'apt-ray[serve]'"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            CLI,
            ("fit", "--data", "s3://bucket/washer", "--out", "x"),
            "this needs boto3: pip install 'apt-ray[s3]'",
        ),
        (
            CLI,
            ("evaluate", "--data", "absent", "--report", "x"),
            "this needs matplotlib: pip install 'apt-ray[report]'",
        ),
        (
            CLI,
            ("registry", "history", "washer"),
            "this needs mlflow: pip install 'apt-ray[registry]'",
        ),
        (SEARCH, ("--data", "absent"), TUNE),
        (SEARCH, ("--register-pending",), "this needs mlflow: pip install 'apt-ray[registry]'"),
        (FLEET, ("deploy", "serving/fleet.yaml"), SERVE),
        (FLEET, ("status",), SERVE),
        (FLEET, ("history", "washer"), "this needs mlflow: pip install 'apt-ray[registry]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_that_needs_an_extra_says_which(
    main: str, arguments: tuple[str, ...], message: str
) -> None:
    run = python(main, *arguments)
    assert (run.returncode, run.stderr) == (1, f"error: {message}\n")
