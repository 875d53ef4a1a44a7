"""What a person says of a part in the console, until an operator lets it into a version."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.registry import CANDIDATE
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import page
from tests.serving.console.fleets import WholeFleet, served, tokens
from tests.serving.console.reach import serious


@pytest.fixture
def strict(prompt_set: PromptSet, category: Category, tmp_path: Path) -> Iterator[WholeFleet]:
    """A fleet that rejects whatever is unusual at all, and keeps what it inspected."""
    registry = FakeRegistry()
    threshold = prompt_set.threshold.moved_to(0.01)
    support = category.support_set(3, seed=0)
    registry.register(prompt_set.with_threshold(threshold), pictures={}, trials=[], support=support)
    auth = tokens(line=["inspect", "feedback"], boss=["operate", "inspect"])
    with served(WholeFleet(registry, tmp_path, auth=auth)) as running:
        yield running


def enter(tab: Page, path: str, name: str) -> None:
    tab.goto(path)
    tab.get_by_label("Access token").fill(name)
    tab.get_by_role("button", name="Sign in").click()


def test_a_false_alarm_is_reported_and_accepted(
    browser: Browser, strict: WholeFleet, category: Category
) -> None:
    good = next(image.path for image in category.test if not image.is_anomalous)
    with page(browser, strict.url) as tab:
        enter(tab, f"/c/{category.name}", "line")
        tab.locator("input[type=file]").first.set_input_files(good)
        button = tab.get_by_role("button", name="This was a good part")
        button.click()
        expect(tab.get_by_text("Kept as false alarm.")).to_be_visible()
        expect(button).to_have_attribute("aria-pressed", "true")
        assert serious(tab) == []

        # The same in the history: another word of the same person takes its place.
        enter(tab, f"/c/{category.name}/history", "line")
        tab.locator(".card").first.click()
        dialog = tab.get_by_role("dialog")
        dialog.get_by_label("Note").fill("glare" + 200 * "e")
        dialog.get_by_role("button", name="Was good").click()
        expect(dialog.get_by_text(re.compile("Marked good by line"))).to_be_visible()

        enter(tab, f"/c/{category.name}/versions", "boss")
        told = tab.get_by_role("region", name="Feedback")
        expect(told.get_by_role("row")).to_have_count(2)
        expect(told).to_contain_text("false alarm")
        expect(told).to_contain_text("glare")
        expect(told.locator("img")).to_be_visible()
        assert told.evaluate("table => table.scrollWidth <= table.clientWidth")
        tab.get_by_role("button", name="Accept false alarms").click()
        reason = tab.get_by_role("dialog")
        reason.get_by_label("Reason").fill("glare of the new lamp")
        reason.get_by_role("button", name="Accept", exact=True).click()
        expect(
            tab.get_by_text(re.compile("Version 2 waits: No confirmed", re.IGNORECASE))
        ).to_be_visible(timeout=60_000)
        expect(tab.get_by_role("row").filter(has_text="candidate")).to_contain_text("v2")
    assert strict.registry.aliases()[category.name][CANDIDATE] == 2
