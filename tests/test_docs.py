"""Every code block of the documents runs, as a reader would run it from the first to the last.

A block that cannot run where the tests do says so in the line before it, `<!-- not run: why -->`,
and nowhere else; `NOT_RUN` names and counts them. Blocks that a program writes are compared by
their own test (`GENERATED`).
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from apt_ray.devtools.local_stack import command_environment

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {
    "docs/api.md": "tests/test_package.py",
    "docs/errors.md": "tests/serving/test_problems.py",
}
NOT_RUN = [
    "README.md: downloads weights",
    "docs/accuracy.md: downloads weights and data sets",
    "docs/accuracy.md: installs anomalib, takes hours",
    "docs/accuracy.md: takes hours",
    "docs/operating.md: names images of yours",
    "docs/operating.md: names images of yours",
    "docs/operating.md: needs a Kubernetes cluster and a registry of images",
    "docs/registry.md: needs PostgreSQL and a bucket; tests/registry/test_servers.py runs the like",
    "docs/video.md: needs a camera and a fleet",
    "docs/video.md: needs a video of yours",
]

_BLOCK = re.compile(
    r"^(?:[ ]*<!-- not run: (?P<reason>.+) -->\n)?(?P<indent>[ ]*)```(?P<language>.*)\n"
    r"(?P<text>(?s:.*?))^[ ]*```[ ]*$",
    re.MULTILINE,
)
# The verdict of `registry promote` that the champion stays is an answer, no failure.
_COMMAND = """#!/bin/bash
{flags}
{python} -m apt_ray "$@"
status=$?
[ $status = 3 ] || exit $status
"""
_FEW_STEPS = """case $1 in
fit) set -- "$@" --steps 2 ;;
evaluate) set -- "$@" --categories washer --seeds 0 --shots 1 --steps 1 ;;
esac"""
# Several documents speak of two versions; a search of the documents before has registered one.
_SECOND_VERSION = """
from apt_ray import PromptSet
from apt_ray.registry import open_registry

fitted = PromptSet.load("washer.safetensors")
open_registry().register(fitted, pictures={}, trials=[], promote=False)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and why it is not run, if so."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_quick(self) -> bool:
        """Whether it needs neither a server nor the checkout."""
        commands = self.text.replace("\\\n", " ").splitlines()
        return self.reason is None and (
            self.language == "python"
            or all(re.match(r"apt-ray (?!registry)", command) for command in commands)
        )


def documents() -> list[str]:
    """The Markdown files, those that a reader opens first first."""
    first, *others = "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"
    below = sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("docs", "apt_ray", "benchmarks", "serving", "tuning")
        for path in (ROOT / folder).rglob("*.md")
    )
    return [first, *below, *others]


def blocks() -> list[Block]:
    found = []
    for document in documents():
        text = (ROOT / document).read_text()
        for match in _BLOCK.finditer(text):
            indent = match["indent"]
            lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
            found.append(
                Block(
                    document=document,
                    line=text.count("\n", 0, match.start("language")) + 1,
                    language=match["language"],
                    text="\n".join(lines) + "\n",
                    reason=match["reason"],
                )
            )
        fences = len(re.findall(r"^ *```", text, re.MULTILINE))
        assert fences == 2 * sum(block.document == document for block in found), document
    return found


def test_what_is_not_run_is_named() -> None:
    """And every language is known, so that no block escapes by another name for its own."""
    everything = blocks()
    assert {block.language for block in everything} <= {"console", "python", "text", ""}
    assert sorted(f"{b.document}: {b.reason}" for b in everything if b.reason) == NOT_RUN
    mark = re.compile(r"^[ ]*<!-- not run", re.MULTILINE)
    marks = sum(len(mark.findall((ROOT / name).read_text())) for name in documents())
    assert marks == len(NOT_RUN), "a mark stands in the line before its block"
    for document, test in GENERATED.items():
        assert Path(document).name in (ROOT / test).read_text()


def code() -> list[Block]:
    """The blocks that are run."""
    return [
        block
        for block in blocks()
        if block.language in ("console", "python")
        and block.reason is None
        and block.document not in GENERATED
    ]


def read_and_do(
    read: Sequence[Block], folder: Path, *, flags: str = "", environment: dict[str, str]
) -> str:
    """Run the blocks in one shell, as one reader in one terminal; returns what was printed."""
    tools = folder.parent / f"{folder.name}-tools"
    tools.mkdir()
    command = tools / "apt-ray"
    command.write_text(_COMMAND.format(flags=flags, python=sys.executable))
    command.chmod(0o755)
    script = ["set -eo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for number, block in enumerate(read):
        script.append(f"printf '\\n== %s\\n' '{block.place}'")
        # The environment that a block makes is left to the next; the command stays the one here.
        script.append(f'export PATH={tools}:"$PATH"')
        if block.language == "python":
            (tools / f"{number}.py").write_text(block.text)
            script.append(f"python {tools / f'{number}.py'}")
        else:
            script.append(block.text)
    (tools / "script").write_text("\n".join(script))
    with (tools / "log").open("w+") as log:
        done = subprocess.run(
            ["bash", tools / "script"],
            cwd=folder,
            env=command_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    printed = (tools / "log").read_text()
    assert done.returncode == 0, printed[-8000:]
    return printed


@pytest.mark.timeout(900)
def test_the_blocks_without_servers_run_from_an_empty_folder(tmp_path: Path) -> None:
    """With few steps and little data; `make docs` runs them as they are written."""
    folder = tmp_path / "empty"
    folder.mkdir()
    quick = [block for block in code() if block.is_quick]
    assert {block.language for block in quick} == {"console", "python"}
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    printed = read_and_do(quick, folder, flags=_FEW_STEPS, environment=environment)
    assert "ANOMALOUS" in printed
    assert "True 0." in printed
    assert {path.name for path in folder.iterdir()} == {
        *("data", "washer.safetensors", "overlays", "old.npz", "new.npz", "report", "edge"),
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_block_runs_in_the_order_of_reading(tmp_path: Path) -> None:
    """In a checkout; tests and checks that the documents name are collected, not run again."""
    folder = tmp_path / "apt-ray"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".demo", ".*_cache", "__pycache__", "mutants", ".mutants", ".peers"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    installed = folder / ".venv"
    installed.mkdir()
    for path in Path(sys.prefix).iterdir():
        (installed / path.name).symlink_to(path)
    (installed / ".ready").unlink(missing_ok=True)
    (installed / ".ready").touch()
    second = Block("a second version", 1, "python", _SECOND_VERSION, None)
    read = code()
    place = next(i for i, b in enumerate(read) if "registry promote" in b.text)
    environment = {
        "PYTHONPATH": str(folder),
        "PYTEST_ADDOPTS": "--collect-only -q",
        "HOME": str(tmp_path),
    }
    try:
        printed = read_and_do(
            [*read[:place], second, *read[place:]], folder, environment=environment
        )
    finally:
        subprocess.run(
            [sys.executable, "-m", "apt_ray.devtools.demo", "down"], cwd=folder, check=True
        )
    for block in read:
        assert f"== {block.place}\n" in printed
    print(f"{len(read)} blocks ran, {len(NOT_RUN)} did not:", *NOT_RUN, sep="\n")
