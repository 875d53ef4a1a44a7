"""Every page at every width, in both schemes: accessible, without a jump, behind a prefix too."""

import re
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_ray.data.folders import Category
from serving.replica.inspector import Inspector
from tests.serving.console.browser import DESK, PHONE, TABLET, page
from tests.serving.console.fleets import (
    LIMITS,
    ConsoleFleet,
    MemoryController,
    ready,
    served,
    tokens,
)
from tests.serving.console.reach import serious, tab_to, too_small

SIZES = {"desk": DESK, "tablet": TABLET, "phone": PHONE}


def open_fleet(tab: Page, category: Category) -> None:
    tab.goto("/")
    tab.get_by_role("link", name=category.name).wait_for()


def open_start(tab: Page, category: Category) -> None:
    tab.goto(f"/c/{category.name}")
    tab.get_by_text("Drop images here").wait_for()


def open_verdict(tab: Page, category: Category) -> None:
    open_start(tab, category)
    bad = next(image.path for image in category.test if image.is_anomalous)
    tab.get_by_label("Images", exact=True).set_input_files(bad)
    tab.locator("output.figure").wait_for()
    tab.locator(".threshold summary").click()


def open_sheet(tab: Page, category: Category) -> None:
    open_start(tab, category)
    paths = [image.path for image in category.test[:3]]
    tab.get_by_label("Images", exact=True).set_input_files(paths)
    tab.locator(".progress.whole").wait_for(state="attached")
    expect(tab.locator(".card img")).to_have_count(3)


def open_unknown(tab: Page, category: Category) -> None:
    tab.goto("/c/nothing")
    tab.get_by_role("alert").wait_for()


def open_docs(tab: Page, category: Category) -> None:
    tab.goto("/docs")
    tab.get_by_text("/v1/{category}/inspect").first.wait_for()


PAGES: dict[str, Callable[[Page, Category], None]] = {
    "fleet": open_fleet,
    "start": open_start,
    "verdict": open_verdict,
    "sheet": open_sheet,
    "unknown": open_unknown,
    "docs": open_docs,
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_every_screen_and_keeps_nobody_out(
    browser: Browser, fleet: ConsoleFleet, category: Category, name: str, scheme: str
) -> None:
    with page(browser, fleet.url, dark=scheme == "dark") as tab:
        PAGES[name](tab, category)
        for size, (width, height) in SIZES.items():
            tab.set_viewport_size({"width": width, "height": height})
            assert serious(tab) == [], size
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), size
            assert too_small(tab) == [], size


def test_signing_in_keeps_nobody_out(browser: Browser, fleet: ConsoleFleet) -> None:
    fleet.allow(tokens(line=["inspect"]))
    with page(browser, fleet.url, size=PHONE) as tab:
        tab.goto("/")
        tab.get_by_label("Access token").wait_for()
        assert serious(tab) == []


@pytest.mark.parametrize("size", SIZES)
def test_nothing_jumps(
    browser: Browser, fleet: ConsoleFleet, category: Category, size: str
) -> None:
    watch = """() => {
        window.shifts = [];
        new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) =>
            [entry.value, entry.sources.map(({ node }) => node?.outerHTML?.slice(0, 90))])))
            .observe({ type: "layout-shift", buffered: true });
    }"""
    with page(browser, fleet.url, size=SIZES[size]) as tab:
        for name in ("fleet", "start"):
            PAGES[name](tab, category)
            tab.evaluate(watch)
            tab.wait_for_timeout(500)
            assert [each for each in tab.evaluate("shifts") if each[0] > 0.01] == []


def test_the_scheme_is_chosen_and_remembered(browser: Browser, fleet: ConsoleFleet) -> None:
    with page(browser, fleet.url, dark=True) as tab:
        tab.goto("/")
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = tab.evaluate(ground)
        switch = tab.get_by_role("button", name=re.compile("^Colours"))
        switch.click()
        light = tab.evaluate(ground)
        assert light != dark
        tab.reload()
        switch.wait_for()
        assert tab.evaluate(ground) == light
        switch.click()
        switch.click()
        assert tab.evaluate(ground) == dark


def test_the_keyboard_alone_leads_from_the_fleet_to_a_verdict(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        # Chromium is told to hand choosers over once somebody listens, which takes it a while.
        tab.on("filechooser", lambda _: None)
        open_fleet(tab, category)
        tab.keyboard.press("Tab")
        expect(tab.get_by_text("Skip to the content")).to_be_focused()
        tab_to(tab, category.name)
        tab.keyboard.press("Enter")
        tab.get_by_text("Drop images here").wait_for()
        tab_to(tab, "Choose images")
        with tab.expect_file_chooser() as chooser:
            tab.keyboard.press("Enter")
        chooser.value.set_files(category.test[0].path)
        tab.locator("output.figure").wait_for()
        tab_to(tab, "Side by side")
        tab.keyboard.press("Space")
        expect(tab.locator(".pane")).to_have_count(2)


@pytest.fixture
def prefixed(inspector: Inspector, category: Category) -> Iterator[ConsoleFleet]:
    """A fleet behind a web server that offers it at /fleet/west."""

    def at_west(app: ASGIApp) -> ASGIApp:
        async def without_prefix(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                assert scope["path"].startswith("/fleet/west/")
                scope = {**scope, "path": scope["path"].removeprefix("/fleet/west")}
            await app(scope, receive, send)

        return without_prefix

    http = LIMITS.model_copy(update={"root_path": "/fleet/west"})
    behind = ConsoleFleet(inspector, MemoryController({category.name: ready()}), http=http)
    with served(behind, at_west) as running:
        yield running


def test_it_works_behind_a_path_prefix(
    browser: Browser, prefixed: ConsoleFleet, category: Category
) -> None:
    with page(browser, prefixed.url) as tab:
        tab.goto("/fleet/west/")
        tab.get_by_role("link", name=category.name).click()
        expect(tab).to_have_url(re.compile(f"/fleet/west/c/{category.name}$"))
        tab.get_by_label("Images", exact=True).set_input_files(category.test[0].path)
        tab.locator("output.figure").wait_for()
        tab.goto(f"/fleet/west/c/{category.name}/versions")
        expect(tab.get_by_role("heading", name=category.name)).to_be_visible()
        tab.get_by_role("link", name="API").click()
        expect(tab.get_by_text("/v1/{category}/inspect").first).to_be_visible()


def test_its_files_are_asked_for_again_and_sent_only_if_they_changed(fleet: ConsoleFleet) -> None:
    with httpx.Client(base_url=fleet.url, trust_env=False) as client:
        for path in ("/console/app.js", "/console/style/base.css", "/console/vendor/htm/htm.js"):
            first = client.get(path)
            assert first.headers["cache-control"] == "no-cache"
            assert first.headers["x-content-type-options"] == "nosniff"
            assert first.headers["content-type"].startswith(("text/javascript", "text/css"))
            again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
            assert again.status_code == 304
        policy = client.get("/").headers["content-security-policy"]
        assert "unsafe" not in policy
        assert client.get("/c/some/thing/else").status_code == 404
        assert client.get("/v2").headers["content-type"] == "application/problem+json"
