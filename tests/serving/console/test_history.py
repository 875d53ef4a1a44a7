"""The history of a category: what the fleet kept, and what people say of it."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import page
from tests.serving.console.fleets import ConsoleFleet, WholeFleet, served, tokens


@pytest.fixture
def kept(prompt_set: PromptSet, category: Category, tmp_path: Path) -> Iterator[WholeFleet]:
    """A fleet that has kept what a person called `line` had inspected."""
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    auth = tokens(line=["inspect"])
    with served(WholeFleet(registry, tmp_path, auth=auth)) as running:
        headers = {"Authorization": "Bearer line"}
        with httpx.Client(base_url=running.url, trust_env=False, headers=headers) as client:
            good = [image.path for image in category.test if not image.is_anomalous][:3]
            bad = [image.path for image in category.test if image.is_anomalous][:2]
            for path in (*good, *bad):
                client.post(f"/v1/{category.name}/inspect", content=path.read_bytes())
        yield running


def test_what_was_inspected_is_seen_again_and_marked(
    browser: Browser, kept: WholeFleet, category: Category
) -> None:
    with page(browser, kept.url) as tab:
        tab.goto(f"/c/{category.name}/history")
        tab.get_by_label("Access token").fill("line")
        tab.get_by_role("button", name="Sign in").click()
        cards = tab.locator(".card")
        expect(cards).to_have_count(5)
        image = cards.first.locator("img")
        expect(image).to_be_visible()
        bare = image.get_attribute("src")
        cards.first.hover()
        expect(image).not_to_have_attribute("src", bare or "")  # with its map
        tab.get_by_role("button", name="Rejected").click()
        expect(cards).to_have_count(2)
        for card in cards.all():
            expect(card).to_contain_text("Defective")
        tab.get_by_role("button", name="All", exact=True).click()
        expect(cards).to_have_count(5)

        cards.first.click()
        dialog = tab.get_by_role("dialog")
        expect(dialog.locator("canvas.layer").first).to_be_visible()
        dialog.get_by_label("Note").fill("<b>only dust</b>")
        dialog.get_by_role("button", name="Was good").click()
        expect(dialog.get_by_text(re.compile("Marked good by line"))).to_be_visible()
        dialog.get_by_role("button", name="Older").click()
        expect(dialog.get_by_text("Not marked.")).to_be_visible()
        tab.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(cards.first).to_contain_text("Marked good")
        tab.get_by_role("button", name="Marked", exact=True).click()
        expect(cards).to_have_count(1)
        cards.first.click()
        expect(dialog.get_by_label("Note")).to_have_value("<b>only dust</b>")
        dialog.get_by_role("button", name="Was good").click()  # again: it was a slip
        expect(dialog.get_by_text("Not marked.")).to_be_visible()

        # The threshold is tried on what was kept.
        tab.goto(f"/c/{category.name}")
        tab.get_by_label("Access token").fill("line")
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_text("of 5 inspected images rejected")).to_be_visible()
        tab.get_by_label("Try another").fill("0")
        expect(tab.get_by_text("5 of 5 inspected images rejected")).to_be_visible()


def test_a_fleet_that_keeps_nothing_says_how_it_would(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}/history")
        expect(tab.get_by_text("This fleet keeps no history")).to_be_visible()
        expect(tab.get_by_text("history: {images: 1000}")).to_be_visible()
