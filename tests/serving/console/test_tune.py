"""Tune: good images, a search, its end, and who decides. Ray's jobs are in memory;
test_new_product.py starts real ones."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from serving.replica.inspector import Inspector
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import DESK, PHONE, TABLET, page
from tests.serving.console.fleets import (
    ConsoleFleet,
    MemoryController,
    WholeFleet,
    ready,
    served,
    tokens,
)
from tests.serving.console.reach import serious, tab_to, too_small
from tests.serving.test_tuning import KnownJobs

JUNK = FilePayload(name="notes.png", mimeType="image/png", buffer=b"hello")
FIGURES = {"least_s": 180.0, "most_s": 420.0, "cpu_s": 700.0, "gpu_s": 0.0, "encoded_mib": 3.5}


class Line:
    """A fleet with searches, and what happens to those."""

    def __init__(self, fleet: WholeFleet, registry: FakeRegistry, jobs: KnownJobs) -> None:
        self.fleet, self.registry, self.jobs = fleet, registry, jobs

    @property
    def last(self) -> str:
        name: str = self.jobs.jobs[-1].submission_id
        return name

    def write(self, content: object) -> None:
        """What the last job says of itself."""
        file = self.fleet.searches / "progress" / f"{self.last}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


@pytest.fixture
def line(prompt_set: PromptSet, tmp_path: Path) -> Iterator[Line]:
    registry, jobs = FakeRegistry(), KnownJobs()
    registry.register(prompt_set, pictures={}, trials=[])
    auth = tokens(boss=["operate", "inspect"], line=["inspect"])
    with served(WholeFleet(registry, tmp_path, auth=auth, jobs=jobs)) as running:
        yield Line(running, registry, jobs)


def look(tab: Page) -> None:
    """Ask now, as whoever comes back to a tab does, instead of after some seconds."""
    tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def enter(tab: Page, path: str, token: str = "boss") -> None:
    tab.goto(path)
    tab.get_by_label("Access token").fill(token)
    tab.get_by_role("button", name="Sign in").click()


def good(category: Category, count: int) -> list[Path]:
    return [Path(str(path)) for path in category.good[:count]]


@pytest.mark.timeout(180)
def test_a_new_product_is_learned_searched_promoted_and_served(
    browser: Browser, line: Line, category: Category, prompt_set: PromptSet
) -> None:
    with page(browser, line.fleet.url) as tab:
        # By the keyboard alone up to the search.
        tab.on("filechooser", lambda _: None)
        enter(tab, "/")
        expect(tab.get_by_role("button", name="New product")).to_be_enabled()
        tab_to(tab, "New product")
        tab.keyboard.press("Enter")
        name = tab.get_by_label("Name")
        expect(name).to_be_focused()
        tab.keyboard.type("a b")
        expect(tab.get_by_text("alone: the name stands in addresses")).to_be_visible()
        expect(tab.get_by_role("button", name="Next")).to_be_disabled()
        assert serious(tab) == []
        name.fill(category.name)
        expect(tab.get_by_role("button", name="Open")).to_be_enabled()
        name.fill("bolt")
        tab.keyboard.press("Enter")
        expect(tab.get_by_role("heading", name="bolt", level=1)).to_be_focused()
        expect(tab.get_by_text("serves it as soon as a version is promoted")).to_be_visible()
        expect(tab.get_by_text("No version yet")).to_be_visible()
        expect(tab.get_by_role("button", name="Estimate")).to_be_disabled()
        tab_to(tab, "Choose images")
        with tab.expect_file_chooser() as chooser:
            tab.keyboard.press("Enter")
        chooser.value.set_files(good(category, 3))
        images = tab.locator(".training img")
        expect(images).to_have_count(3)
        tab.get_by_label("Images", exact=True).set_input_files(
            [JUNK, FilePayload(name="0.png", mimeType="", buffer=good(category, 1)[0].read_bytes())]
        )
        expect(tab.get_by_text("notes.png")).to_be_visible()
        expect(tab.get_by_text("1 image was there already.")).to_be_visible()
        tab.get_by_role("button", name="Close").click()
        tab_to(tab, "Strike out image 1")
        tab.keyboard.press("Enter")
        expect(images).to_have_count(2)
        expect(tab.get_by_role("button", name="Strike out image 1")).to_be_focused()
        expect(tab.get_by_text("2 images for 4 shots")).to_be_visible()
        tab.get_by_label("Shots").fill("2")
        tab_to(tab, "Trials")
        tab.keyboard.type("3")
        tab_to(tab, "Estimate")
        tab.keyboard.press("Enter")
        expect(tab.get_by_text("Timing the parts of a search")).to_be_visible()
        expect(tab.get_by_text("One moment: the estimate")).to_be_visible()
        line.write({"estimate": {**FIGURES, "cpus": 2, "gpus": 0}})
        line.jobs.end(line.last, "SUCCEEDED")
        look(tab)
        expect(tab.locator(".estimate")).to_contain_text("3 min to 7 min")
        expect(tab.locator(".estimate")).to_contain_text("12 min of a CPU; the cluster has 2 CPUs")
        tab_to(tab, "Search")
        tab.keyboard.press("Enter")
        expect(tab.get_by_text("The images are being encoded.")).to_be_visible()
        assert "--shots 2 --trials 3" in line.jobs.jobs[-1].entrypoint
        progress = {"trials": 3, "ended": 1, "live": 2, "best": 0.9, "best_sd": 0.1, "left_s": 30}
        line.write({"categories": {"bolt": progress}})

        # Whoever comes later sees how far it is.
        enter(tab, "/c/bolt/tune")
        view = tab.get_by_role("region", name="Last search")
        for text in ("Running", "1 of 3", "0.900 ± 0.100", "30 s", "Started by boss"):
            expect(view).to_contain_text(text)
        expect(view.get_by_role("link", name="Ray job")).to_have_attribute(
            "href", f"https://ray.example/#/jobs/{line.last}"
        )
        expect(tab.get_by_label("Shots")).to_have_value("2")
        assert serious(tab) == []
        line.jobs.end(line.last, "FAILED", "12:00:00  not registered: bolt: too dark")
        look(tab)
        expect(tab.get_by_role("alert")).to_contain_text("Too dark.")
        view.get_by_text("Log", exact=True).click()
        expect(view.get_by_label("End of the log")).to_contain_text("not registered: bolt")
        tab.get_by_role("button", name="Search").click()
        expect(view).to_contain_text("encoded")
        view.get_by_role("button", name="Stop …").click()
        tab.get_by_role("button", name="Stop it").click()
        expect(view).to_contain_text("It was stopped")
        tab.get_by_role("button", name="Search").click()
        expect(view).to_contain_text("encoded")
        line.registry.register(
            prompt_set.with_category("bolt"),
            pictures={name: Image.new("RGB", (60, 40)) for name in ("trials", "perturbations")},
            trials=[],
            tags={"ray.submission_id": line.last},
            promote=False,
        )
        line.jobs.end(line.last, "SUCCEEDED")
        look(tab)

        # What it found, and who decides.
        outcome = tab.get_by_role("region", name="What came of it")
        expect(outcome).to_contain_text("of the last search")
        expect(outcome.locator("img")).to_have_count(2)
        outcome.get_by_role("button", name="Made-up defects").click()
        expect(tab.get_by_role("dialog").get_by_role("img", name="Made-up defects")).to_be_visible()
        tab.keyboard.press("Escape")
        assert serious(tab) == []
        outcome.get_by_role("button", name="Promote v1").click()
        dialog = tab.get_by_role("dialog")
        expect(dialog).to_contain_text("it becomes the first")
        expect(dialog.get_by_role("checkbox")).to_have_count(0)
        dialog.get_by_label("Reason").fill("The first of its kind")
        dialog.get_by_role("button", name="Promote").click()
        expect(outcome).to_contain_text("Version 1 serves: there was no champion")
        expect(tab.get_by_text("Not served yet")).to_have_count(0)
        tab.get_by_role("link", name="Inspect images").click()
        bad = next(image.path for image in category.test if image.is_anomalous)
        tab.get_by_label("Images", exact=True).set_input_files(bad)
        expect(tab.locator(".verdict.large")).to_have_text("Defective")

        # Elsewhere in the console.
        tab.get_by_role("link", name="Versions").click()
        tab.get_by_role("button", name="Pictures of version 1").click()
        expect(tab.get_by_role("dialog").locator("img")).to_have_count(2)
        tab.keyboard.press("Escape")
        tab.get_by_role("link", name="Searches").click()
        rows = tab.locator("table.list tbody tr")
        expect(rows).to_have_count(4)
        expect(rows.filter(has_text="too dark")).to_contain_text("Failed")
        assert serious(tab) == []
        rows.first.get_by_role("link", name="bolt").click()
        expect(tab).to_have_url(re.compile("/c/bolt/tune$"))


def test_what_stands_in_the_way_is_told(
    browser: Browser, line: Line, inspector: Inspector, category: Category
) -> None:
    with page(browser, line.fleet.url) as tab:
        enter(tab, f"/c/{category.name}/tune", "line")
        expect(tab.get_by_role("alert")).to_contain_text("may inspect, but not tune")
        enter(tab, "/searches", "line")
        expect(tab.get_by_role("alert")).to_contain_text("scope operate")
        expect(tab.get_by_role("link", name="Searches")).to_have_count(0)
        enter(tab, "/c/no.good/tune")
        expect(tab.get_by_role("alert").first).to_contain_text("category")
        enter(tab, "/c/unheard/inspect")
        tab.get_by_role("link", name="Tune unheard as a new product").click()
        expect(tab.get_by_text("Not served yet")).to_be_visible()
        # Neither Ray's jobs nor the registry: the images can be seen to all the same.
        line.jobs.is_away = line.registry.is_away = True
        enter(tab, f"/c/{category.name}/tune")
        expect(tab.get_by_role("alert").first).to_contain_text("Ray does not tell its jobs")
        expect(tab.get_by_role("alert").last).to_contain_text("Registry unavailable")
        tab.get_by_role("button", name="In a folder").click()
        tab.get_by_label("Folder on the cluster").fill("s3://bucket/parts")
        tab.get_by_role("button", name="Search", exact=True).click()
        form = tab.locator(".search-form")
        expect(form.get_by_role("alert")).to_contain_text("Ray does not tell its jobs")
        line.jobs.is_away = False
        tab.get_by_role("button", name="Search", exact=True).click()
        expect(tab.get_by_role("region", name="Last search")).to_contain_text("Running")
        assert "--data s3://bucket/parts" in line.jobs.jobs[-1].entrypoint
    off = ConsoleFleet(inspector, MemoryController({category.name: ready()}))
    with served(off), page(browser, off.url) as tab:
        for path in (f"/c/{category.name}/tune", "/searches"):
            tab.goto(path)
            expect(tab.get_by_text("This fleet takes no searches")).to_be_visible()


def test_its_pages_fit_every_screen_and_keep_nobody_out(
    browser: Browser, line: Line, category: Category, prompt_set: PromptSet
) -> None:
    line.registry.register(
        prompt_set, pictures={"trials": Image.new("RGB", (60, 40))}, trials=[], promote=False
    )
    with page(browser, line.fleet.url, dark=True) as tab:

        def fits() -> None:
            for width, height in (DESK, TABLET, PHONE):
                tab.set_viewport_size({"width": width, "height": height})
                assert serious(tab) == [], width
                assert too_small(tab) == [], width
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), width

        enter(tab, f"/c/{category.name}/tune")
        tab.get_by_label("Images", exact=True).set_input_files(good(category, 2))
        expect(tab.locator(".training img")).to_have_count(2)
        tab.get_by_label("Shots").fill("1")
        tab.get_by_role("button", name="Search").click()
        expect(tab.get_by_role("region", name="Last search")).to_contain_text("encoded")
        expect(tab.locator(".pictures img")).to_have_count(1)
        fits()
        tab.get_by_role("link", name="Searches").click()
        expect(tab.locator("table.list tbody tr")).to_have_count(1)
        fits()
        tab.get_by_role("link", name="Fleet", exact=True).click()
        tab.get_by_role("button", name="New product").click()
        fits()
