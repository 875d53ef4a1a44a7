"""What the console consists of: small, its own, and as its makers published it."""

import hashlib
import re
from pathlib import Path

import pytest

CONSOLE = Path(__file__).resolve().parents[3] / "serving" / "console"
MODULES = sorted(path for path in CONSOLE.rglob("*.js") if "vendor" not in path.parts)


def test_it_is_small() -> None:
    """What a browser may ask for."""
    files = [path for path in CONSOLE.rglob("*") if path.is_file() and path.name != "LICENSE"]
    assert sum(path.stat().st_size for path in files) <= 300_000


def test_what_others_made_is_as_they_published_it() -> None:
    table = (CONSOLE / "vendor/README.md").read_text()
    published = dict(re.findall(r"^\| `([^`]+)` .*? \| `([0-9a-f]{64})` \|", table, re.MULTILINE))
    vendored = {
        path.relative_to(CONSOLE / "vendor").as_posix()
        for path in (CONSOLE / "vendor").rglob("*")
        if path.is_file() and path.name not in ("LICENSE", "README.md")
    }
    assert set(published) == vendored
    for name, sha256 in published.items():
        data = (CONSOLE / "vendor" / name).read_bytes()
        if name.startswith("preact/"):  # the two changes that the table names
            data = data.replace(b'from"./preact.js"', b'from"preact"')
            data += f"//# sourceMappingURL={Path(name).stem}.mjs.map\n".encode()
        assert hashlib.sha256(data).hexdigest() == sha256, name
        assert (CONSOLE / "vendor" / name).with_name("LICENSE").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(CONSOLE).as_posix())
def test_a_module_makes_no_code_or_markup_of_text(path: Path) -> None:
    text = path.read_text()
    for forbidden in (r"\beval\(", r"\bFunction\(", r"innerHTML", r"outerHTML", r"document\.write"):
        assert not re.search(forbidden, text), forbidden
    # No address but the fleet's own: all others are told by it.
    assert not re.search(r"https?://", text)


def test_the_token_is_kept_nowhere() -> None:
    for path in MODULES:
        text = path.read_text()
        assert "sessionStorage" not in text
        assert "cookie" not in text
        if "localStorage" in text:
            assert set(re.findall(r'localStorage\.\w+\("([^"]+)"', text)) == {"apt-ray theme"}


def test_the_page_asks_for_all_its_modules_at_once() -> None:
    asked = set(re.findall(r'"/console/([^"]+\.js)"', (CONSOLE / "index.html").read_text()))
    others = {"docs.js"}
    assert (
        asked == {path.relative_to(CONSOLE).as_posix() for path in CONSOLE.rglob("*.js")} - others
    )


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_a_page_has_no_inline_script_or_style(name: str) -> None:
    text = (CONSOLE / name).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    for module in re.findall(r'(?:src|href)="(/console/[^"]+)"', text):
        assert (CONSOLE.parent / module.lstrip("/")).is_file()
