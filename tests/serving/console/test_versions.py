"""Versions: which serves, which waits, and moving the champion with a reason."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from serving.controller.shadow import ShadowCounts, ShadowOrder, ShadowReport, Shadows
from serving.replica.inspector import Inspector
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import page
from tests.serving.console.fleets import (
    ConsoleFleet,
    MemoryController,
    WholeFleet,
    ready,
    served,
    tokens,
)
from tests.serving.console.reach import serious

WHY = "Fewer false alarms under the new lamp"


@pytest.fixture
def registry(prompt_set: PromptSet) -> FakeRegistry:
    """One champion and a candidate."""
    registry = FakeRegistry()
    for _ in range(2):
        registry.register(prompt_set, pictures={}, trials=[])
    return registry


@pytest.fixture
def whole(registry: FakeRegistry, tmp_path: Path) -> Iterator[WholeFleet]:
    """A fleet that serves that champion, to the token `boss`."""
    auth = tokens(boss=["operate", "inspect"])
    with served(WholeFleet(registry, tmp_path, auth=auth)) as running:
        yield running


def enter(tab: Page, path: str) -> None:
    tab.goto(path)
    tab.get_by_label("Access token").fill("boss")
    tab.get_by_role("button", name="Sign in").click()


def decide(tab: Page, label: str, *, force: bool = False) -> None:
    tab.get_by_role("button", name=re.compile(f"^{label}")).click()
    dialog = tab.get_by_role("dialog")
    act = dialog.get_by_role("button", name=label, exact=True)
    expect(act).to_be_disabled()
    expect(dialog.get_by_label("Reason")).to_be_focused()
    assert serious(tab) == []
    dialog.get_by_label("Reason").fill(f"{WHY}\n")
    if force:
        dialog.get_by_label(re.compile("whatever the comparison says")).check()
    act.click()
    expect(dialog).to_have_count(0)


def test_a_candidate_is_promoted_and_rolled_back_with_reasons(
    browser: Browser, whole: WholeFleet, registry: FakeRegistry, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        enter(tab, f"/c/{category.name}/versions")
        rows = tab.locator("table.list tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("candidate")
        expect(rows.nth(1)).to_contain_text("champion")
        assert serious(tab) == []
        decide(tab, "Promote", force=True)
        expect(tab.get_by_text("Version 2 serves", exact=False)).to_be_visible()
        expect(rows.nth(0)).to_contain_text("champion")
        expect(rows.nth(0)).to_contain_text(f"forced: {WHY} (boss, through the fleet)")
        assert registry.aliases()[category.name]["champion"] == 2
        expect(tab.locator(".facts")).to_contain_text("v2")  # and the replicas have followed
        decide(tab, "Roll back")
        expect(tab.get_by_text("Version 1 serves again")).to_be_visible()
        assert registry.history(category.name).moves[-1].why.startswith(WHY)


def test_a_candidate_is_discarded(
    browser: Browser, whole: WholeFleet, registry: FakeRegistry, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        enter(tab, f"/c/{category.name}/versions")
        decide(tab, "Discard")
        expect(tab.get_by_text("Version 2 waits no more")).to_be_visible()
        expect(tab.locator("tbody tr").first).to_contain_text(f"Discarded: {WHY}")
        expect(tab.get_by_role("button", name=re.compile("^Promote"))).to_be_disabled()
        assert registry.aliases()[category.name] == {"champion": 1}


def test_what_the_registry_refuses_is_told_where_it_was_asked(
    browser: Browser, whole: WholeFleet, registry: FakeRegistry, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        enter(tab, f"/c/{category.name}/versions")
        tab.get_by_role("button", name=re.compile("^Roll back")).click()
        dialog = tab.get_by_role("dialog")
        dialog.get_by_label("Reason").fill(WHY)
        dialog.get_by_role("button", name="Roll back").click()
        # Nothing served before the first.
        expect(tab.get_by_role("alert")).to_contain_text("Roll back: it failed")
        registry.is_away = True
        tab.reload()
        enter(tab, f"/c/{category.name}/versions")
        expect(tab.get_by_role("alert").first).to_contain_text("Registry unavailable")


def test_a_registry_that_is_away_is_told(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}/versions")
        expect(tab.get_by_role("alert")).to_contain_text("No registry answers at memory")


def test_what_the_candidate_makes_of_the_line_is_told(
    browser: Browser, inspector: Inspector, category: Category
) -> None:
    counts = ShadowCounts(both_pass=980, both_reject=5, candidate_rejects=12, champion_rejects=3)
    counts = counts.plus(ShadowCounts(dropped=4, shift=2.0, shifts={-2: 100, 0: 800, 4: 100}))
    order = ShadowOrder(champion=7, candidate=8, share=0.1, pair="7-8")
    shadows = Shadows()
    shadows.follow({category.name: order})
    since = "2026-05-04T14:10:00+00:00"
    report = ShadowReport(id="one", pair="7-8", since=since, counts=counts)
    shadows.hear(category.name, report)
    trying = ready(candidate=8, shadow=shadows.status(category.name, [report]))
    controller = MemoryController({category.name: trying})
    with served(ConsoleFleet(inspector, controller)) as fleet, page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}/versions")
        told = tab.get_by_role("region", name="The candidate beside the champion")
        expect(told).to_contain_text("Version 8 is tried behind the answers of version 7, on 10 %")
        expect(told).to_contain_text("Both agree on 98.5 % of 1,000 since 4 May 2026")
        expect(told).to_contain_text("rejects 12 that pass, and lets 3 pass that are rejected")
        expect(told).to_contain_text("+0.002 in the mean; 90 % by -0.010 to +0.020")
        expect(told).to_contain_text("no time for 4 more")
        assert serious(tab) == []
        told.get_by_role("link", name="Look where they disagree").click()
        expect(tab.get_by_role("button", name="Disagreeing")).to_have_attribute(
            "aria-pressed", "true"
        )


def test_champion_and_candidate_are_set_side_by_side(
    browser: Browser, whole: WholeFleet, category: Category
) -> None:
    with page(browser, whole.url) as tab:
        enter(tab, f"/c/{category.name}")
        bad = next(image.path for image in category.test if image.is_anomalous)
        tab.get_by_label("Images", exact=True).set_input_files(bad)
        tab.get_by_role("button", name="Compare with the candidate").click()
        expect(tab.locator(".pane figcaption")).to_have_text(["Champion", "Candidate"])
        beside = tab.locator("table.small tbody tr")
        expect(beside.nth(0)).to_contain_text("Champion v1")
        expect(beside.nth(1)).to_contain_text("Candidate v2")
        tab.get_by_role("button", name="Champion alone").click()
        expect(tab.locator(".pane")).to_have_count(1)
