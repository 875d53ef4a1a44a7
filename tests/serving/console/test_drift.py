"""Drift in the console: marked in the fleet and at the category, until somebody has seen to it."""

from playwright.sync_api import Browser, expect

from apt_ray.data.folders import Category
from serving.controller.drift import DriftStatus
from serving.replica.inspector import Inspector
from tests.serving.console.browser import page
from tests.serving.console.fleets import ConsoleFleet, MemoryController, ready, served
from tests.serving.test_drift import alarm


def test_drift_is_marked_until_it_is_seen_to(
    browser: Browser, inspector: Inspector, category: Category
) -> None:
    drifting = ready(drift=DriftStatus(learning=0, alarms=(alarm(),)))
    controller = MemoryController({category.name: drifting, "calm": ready()})
    says = "Images are darker than they were, since 4 May 2026"
    with served(ConsoleFleet(inspector, controller)) as fleet, page(browser, fleet.url) as tab:
        tab.goto("/")
        tab.get_by_role("button", name="Drift").click()
        expect(tab.get_by_text("1 category", exact=True)).to_be_visible()
        expect(tab.get_by_role("row").filter(has_text=category.name)).to_contain_text(says)
        tab.get_by_role("link", name=category.name).click()
        message = tab.get_by_role("status").filter(has_text=says)
        expect(message).to_contain_text("brightness 0.500 before, 0.400 since")
        message.get_by_role("button", name="Seen to").click()
        tab.get_by_label("Reason").fill("cleaned the lamp")
        tab.get_by_role("button", name="Seen to", exact=True).click()
        expect(tab.get_by_role("dialog")).to_have_count(0)
        expect(message).to_have_count(0)
