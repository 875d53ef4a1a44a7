"""The names that `import apt_ray` offers."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import apt_ray
from apt_ray import errors, registry
from apt_ray.cli.main import main
from tests.api_reference import reference
from tests.fakes import FakeBackbone

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


def _functions() -> Iterator[tuple[str, Callable[..., object]]]:
    """The public functions, and the methods of the public classes."""
    for name in apt_ray.__all__:
        offered = getattr(apt_ray, name)
        if inspect.isfunction(offered):
            yield name, offered
        for key, member in vars(offered).items() if inspect.isclass(offered) else ():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and not key.startswith("_"):
                yield f"{name}.{key}", function
    for name in registry.__all__:
        if inspect.isfunction(getattr(registry, name)):
            yield f"registry.{name}", getattr(registry, name)
    for name in ("register", "register_pending"):
        yield f"Registry.{name}", getattr(registry.Registry, name)


PATHS = {
    "location": {"path"},
    "find_categories": {"root"},
    "Category.name_of": {"path"},
    "fit": {"support", "calibration"},
    "Export.save": {"folder"},
    "ExportedDetector.load": {"path"},
    "read_image": {"path"},
    "read_frames": {"path"},
    "find_reading": {"support"},
    "PromptSet.save": {"path"},
    "PromptSet.load": {"path"},
    "registry.export_registry": {"path"},
    "registry.import_registry": {"path"},
    "registry.promote": {"normal"},
    "Registry.register": {"support", "held_out", "pending"},
    "Registry.register_pending": {"pending"},
}


def test_every_parameter_that_is_a_path_takes_text_and_any_path() -> None:
    found = {}
    for name, function in _functions():
        hints = get_type_hints(function)
        hints.pop("return", None)
        paths = {key: str(hint) for key, hint in hints.items() if "Path" in str(hint)}
        for key, hint in paths.items():
            assert "str | os.PathLike[str]" in hint, f"{name}: {key} must take what users write"
        if paths:
            found[name] = {*paths}
    assert found == PATHS


class SomePath:
    """What is a path, but no `pathlib.Path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", [str, Path, SomePath])
def test_paths_may_be_text_or_any_path(
    kind: Callable[[Path], Any], sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample_data)
    assert apt_ray.location(kind(Path("washer"))) == Path("washer")
    (category,) = apt_ray.find_categories(kind(Path("washer")))
    assert category.root == sample_data / "washer"
    first, second = (path.relative_to(sample_data) for path in category.good[:2])
    assert apt_ray.read_image(kind(first)) == apt_ray.read_image(category.good[0])
    assert category.name_of(kind(first)) == category.name_of(category.good[0])
    tested = category.test[0].path.relative_to(sample_data)

    backbone = FakeBackbone(patches=8)
    learn, keep = [kind(first), kind(second)], [kind(tested)]
    settings = apt_ray.FitSettings(steps=1)
    fitted = apt_ray.fit("washer", learn, settings, backbone=backbone, calibration=keep)
    assert fitted.provenance.support_names == (first.name, second.name)
    file = kind(tmp_path / "new" / "washer.safetensors")
    fitted.save(file)
    assert apt_ray.PromptSet.load(file).to_bytes() == fitted.to_bytes()

    model = apt_ray.BackboneSpec(name="ViT-B-16", pretrained=kind(Path("weights.pt")))
    assert model.pretrained == "weights.pt"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apt_ray.nothing


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert apt_ray.__version__ == version("apt-ray")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"apt-ray {apt_ray.__version__}\n"


def test_a_checkout_that_is_not_installed_knows_its_version() -> None:
    """As the processes of a Ray job, which import its working directory."""
    code = "import apt_ray; print(apt_ray.__version__)"
    asked = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=Path(apt_ray.__file__).parents[1],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stdout == f"{apt_ray.__version__}\n"


def test_the_reference_says_what_the_docstrings_say() -> None:
    assert REFERENCE.read_text() == reference(), "run: python -m tests.api_reference docs/api.md"
