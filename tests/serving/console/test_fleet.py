"""The fleet's page: live, sorted, searched and filtered, with one category or a thousand."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from serving.controller.orders import CategoryStatus
from serving.replica.inspector import Inspector
from tests.serving.console.browser import page
from tests.serving.console.fleets import ConsoleFleet, MemoryController, busy, ready, served


def thousand() -> dict[str, CategoryStatus]:
    """A thousand categories, some in every state."""
    states = ("READY", "READY", "READY", "IDLE", "LOADING", "FAILED")
    found = {}
    for number in range(1000):
        state = states[number % len(states)]
        problem = "version 8 failed its self-test" if state == "FAILED" else None
        hour = busy(str(number)) if state == "READY" else ready()
        found[f"part-{number:04d}"] = hour.model_copy(update={"state": state, "problem": problem})
    return found


@pytest.fixture
def large(inspector: Inspector) -> Iterator[ConsoleFleet]:
    """A fleet of a thousand categories."""
    with served(ConsoleFleet(inspector, MemoryController(thousand()))) as running:
        yield running


def test_a_thousand_categories_are_searched_sorted_and_filtered(
    browser: Browser, large: ConsoleFleet
) -> None:
    with page(browser, large.url) as tab:
        tab.goto("/")
        links = tab.locator(".row-link")
        expect(links.first).to_have_text("part-0000")
        assert links.count() < 60  # only what is seen
        table = tab.get_by_role("table")
        expect(table).to_have_attribute("aria-rowcount", "1001")
        tab.get_by_role("button", name="Category").click()
        expect(links.first).to_have_text("part-0999")
        tab.mouse.wheel(0, 20_000)
        expect(tab.get_by_role("link", name="part-0640")).to_be_visible()
        tab.keyboard.press("/")
        tab.keyboard.type("part 42")
        expect(links.first).to_have_text("part-0942")
        expect(tab.get_by_text("20 categories")).to_be_visible()
        tab.get_by_role("button", name=re.compile("^Attention")).click()
        expect(tab.get_by_text(re.compile(r"^\d categories"))).to_be_visible()
        for row in tab.locator(".table-body .c-state").all_inner_texts():
            assert row in ("Failed", "Loading")
        # The address says it all: a colleague sees the same.
        there = tab.url
        expect(tab).to_have_url(re.compile("q=part\\+42&show=attention|.*sort=-name"))
        seen = links.all_inner_texts()
        tab.goto(there)
        expect(links.first).to_have_text(seen[0])
        assert links.all_inner_texts() == seen
        tab.get_by_label("Search categories").fill("nothing")
        tab.get_by_role("button", name="Show all categories").click()
        expect(tab.get_by_text("1,000 categories", exact=True)).to_be_visible()


def test_a_row_tells_the_last_hour_and_who_waits(browser: Browser, inspector: Inspector) -> None:
    waiting = busy("any").model_copy(update={"candidate": 8})
    assert waiting.last_hour is not None
    controller = MemoryController({"nut": ready(), "bolt": waiting, "washer": busy("other")})
    with (
        served(ConsoleFleet(inspector, controller)) as fleet,
        page(browser, fleet.url) as tab,
    ):
        tab.goto("/?sort=-rejected")
        row = tab.get_by_role("row").filter(has=tab.get_by_role("link", name="bolt"))
        expect(row).to_contain_text(str(waiting.last_hour.inspected))
        share = waiting.last_hour.rejected / waiting.last_hour.inspected
        expect(row).to_contain_text(f"{100 * share:.1f} %")
        expect(row).to_contain_text("v8 waits")
        expect(row.get_by_role("img")).to_have_attribute(
            "aria-label", f"{waiting.last_hour.inspected} scores, threshold 0.400"
        )
        expect(tab.locator(".row-link").last).to_have_text("nut")  # nothing inspected
        tab.get_by_role("button", name=re.compile("^Candidate")).click()
        expect(tab.locator(".row-link")).to_have_text(["bolt"])


def test_the_keyboard_reaches_every_row_and_its_page(browser: Browser, large: ConsoleFleet) -> None:
    with page(browser, large.url) as tab:
        tab.goto("/")
        first = tab.get_by_role("link", name="part-0000")
        first.focus()
        for _ in range(30):
            tab.keyboard.press("ArrowDown")
        expect(tab.get_by_role("link", name="part-0030")).to_be_focused()
        expect(tab.get_by_role("link", name="part-0030")).to_be_in_viewport()
        tab.keyboard.press("End")
        expect(tab.get_by_role("link", name="part-0999")).to_be_focused()
        tab.keyboard.press("Home")
        expect(first).to_be_focused()
        tab.keyboard.press("Enter")
        expect(tab).to_have_url(re.compile("/c/part-0000$"))
        expect(tab.get_by_role("heading", level=1)).to_be_focused()
        tab.go_back()
        expect(first).to_be_visible()


def test_it_follows_the_fleet_and_says_when_it_cannot(
    browser: Browser, large: ConsoleFleet
) -> None:
    controller = large.controller
    with page(browser, large.url) as tab:
        tab.goto("/")
        state = tab.locator(".table-body .c-state").first
        expect(state).to_have_text("Ready")
        controller.categories["part-0000"] = ready(state="LOADING")
        expect(state).to_have_text("Loading")
        controller.is_away = True
        alert = tab.get_by_role("alert")
        expect(alert).to_contain_text("the fleet's controller")
        expect(tab.get_by_text(re.compile("As of"))).to_be_visible()
        expect(state).to_be_visible()  # what was known stays
        controller.is_away = False
        tab.get_by_role("button", name="Try again").click()
        expect(alert).to_have_count(0)
        controller.registry = "the registry does not answer"
        expect(tab.get_by_text("Registry away")).to_be_visible()


def test_it_rests_while_nobody_looks(browser: Browser, large: ConsoleFleet) -> None:
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with page(browser, large.url) as tab:
        asked: list[str] = []
        tab.goto("/")
        tab.locator(".row-link").first.wait_for()
        tab.on("request", lambda request: asked.append(request.url))
        tab.evaluate(hide, True)
        tab.wait_for_timeout(6000)
        assert asked == []
        with tab.expect_request("**/fleet/status"):
            tab.evaluate(hide, False)


def test_an_empty_fleet_says_what_to_do(browser: Browser, inspector: Inspector) -> None:
    with (
        served(ConsoleFleet(inspector, MemoryController({}))) as empty,
        page(browser, empty.url) as tab,
    ):
        tab.goto("/")
        expect(tab.get_by_text("No category yet")).to_be_visible()


def test_a_fleet_that_is_down_says_so_from_the_start(browser: Browser, large: ConsoleFleet) -> None:
    with page(browser, large.url) as tab:
        tab.route("**/fleet/me", lambda route: route.abort())
        tab.goto("/")
        expect(tab.get_by_role("alert")).to_contain_text("The fleet cannot be reached")
        tab.unroute("**/fleet/me")
        tab.get_by_role("button", name="Try again").click()
        expect(tab.get_by_role("link", name="part-0000")).to_be_visible()
