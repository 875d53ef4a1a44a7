"""The threshold: tried by everyone, changed by whoever may, with a reason."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import page
from tests.serving.console.fleets import WholeFleet, served, tokens


@pytest.fixture
def whole(prompt_set: PromptSet, tmp_path: Path) -> Iterator[WholeFleet]:
    """A fleet of one category."""
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    auth = tokens(boss=["operate", "inspect"], line=["inspect"])
    with served(WholeFleet(registry, tmp_path, auth=auth)) as running:
        yield running


def enter(tab: Page, token: str) -> None:
    tab.get_by_label("Access token").fill(token)
    tab.get_by_role("button", name="Sign in").click()


def test_a_threshold_is_tried_set_with_a_reason_and_taken_back(
    browser: Browser, whole: WholeFleet, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        tab.goto(f"/c/{category.name}")
        enter(tab, "boss")
        facts = tab.locator(".facts")
        expect(facts).to_contain_text(re.compile(r"0\.\d{3}"))
        tab.get_by_label("Try another").fill("0.123")
        tab.get_by_role("button", name="Set 0.123 …").click()
        dialog = tab.get_by_role("dialog")
        dialog.get_by_label("Reason").fill("The customer wants <i>no</i> scratch")
        dialog.get_by_role("button", name="Set 0.123").click()
        expect(dialog).to_have_count(0)
        # The replica follows by itself.
        expect(facts).to_contain_text("0.123")
        expect(facts).to_contain_text("set by an operator")
        panel = tab.locator("details.threshold")
        expect(panel).to_contain_text("Set by boss")
        expect(panel).to_contain_text("The customer wants <i>no</i> scratch")
        tab.get_by_label("Images", exact=True).set_input_files(category.test[0].path)
        expect(tab.locator(".figure.quiet")).to_have_text("0.123")
        panel.locator("summary").click()
        tab.get_by_role("button", name="Undo the operator's").click()
        dialog.get_by_label("Reason").fill("It was a trial")
        dialog.get_by_role("button", name="Undo it").click()
        expect(facts).not_to_contain_text("set by an operator")


def test_whoever_may_not_operate_tries_alone(
    browser: Browser, whole: WholeFleet, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        tab.goto(f"/c/{category.name}")
        enter(tab, "line")
        tab.get_by_label("Try another").fill("0.123")
        expect(tab.get_by_role("button", name=re.compile("^Back to"))).to_be_enabled()
        expect(tab.get_by_role("button", name=re.compile("^Set"))).to_have_count(0)
