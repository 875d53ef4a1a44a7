"""Who is kept out of a page, as axe-core, a finger and the Tab key find it."""

from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page


def serious(tab: Page) -> list[str]:
    """What axe finds that keeps somebody out."""
    found: list[dict[str, Any]] = Axe().run(tab).response["violations"]
    return [
        f"{each['id']}: {node['html']} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def too_small(tab: Page) -> list[str]:
    """What a finger shall hit and cannot; links in running text are not meant."""
    found: list[str] = tab.evaluate(_TOO_SMALL)
    return found


def tab_to(tab: Page, name: str) -> None:
    """Press Tab until what has the focus is called so."""
    for _ in range(60):
        tab.keyboard.press("Tab")
        if name in (tab.evaluate(_FOCUSED) or ""):
            return
    raise AssertionError(f"the Tab key does not lead to {name}")


_TOO_SMALL = """() => [...document.querySelectorAll("button, input, summary, nav a, .row-link")]
    .filter((each) => each.checkVisibility() && !each.closest(".visually-hidden")
        && !each.matches(".visually-hidden, .region, .row-link"))
    .map((each) => [each.outerHTML.slice(0, 120), each.getBoundingClientRect()])
    .filter(([, box]) => box.width < 43.5 || box.height < 43.5)
    .map(([text, box]) => `${text} ${box.width} x ${box.height}`)"""

_FOCUSED = """() => {
    const { ariaLabel, labels, textContent } = document.activeElement;
    return ariaLabel ?? labels?.[0]?.textContent ?? textContent;
}"""
