"""The names that `import apt_ray` offers."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import apt_ray
from apt_ray import errors
from apt_ray.cli.main import main
from tests.api_reference import reference

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "api.md"


def test_what_is_typed_is_what_is_loaded() -> None:
    tree = ast.parse(Path(apt_ray.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == {name: f"apt_ray.{home}" for name, home in apt_ray._HOME.items()}


@pytest.mark.parametrize("name", apt_ray.__all__)
def test_every_name_comes_from_where_it_is_made(name: str) -> None:
    home = import_module(f"apt_ray.{apt_ray._HOME[name]}")
    assert getattr(apt_ray, name) is getattr(home, name)
    assert getattr(apt_ray, name).__module__ == home.__name__
    assert name in dir(apt_ray)


def test_every_error_is_offered() -> None:
    raised = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert raised <= set(apt_ray.__all__)


def test_import_loads_no_library() -> None:
    code = "import sys; before = {*sys.modules}; import apt_ray; print(*{*sys.modules} - before)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(apt_ray.__file__).parents[1],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {name.partition(".")[0] for name in loaded} <= {"apt_ray", *sys.stdlib_module_names}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apt_ray.nothing


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert apt_ray.__version__ == version("apt-ray")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"apt-ray {apt_ray.__version__}\n"


def test_the_reference_says_what_the_docstrings_say() -> None:
    assert REFERENCE.read_text() == reference(), "run: python -m tests.api_reference docs/api.md"
