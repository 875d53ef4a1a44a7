"""A person's way in the browser alone, on a real cluster: from ten good images to a verdict."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from apt_ray.data.folders import find_categories
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.devtools.local_stack import LocalStack, free_ports
from tests.serving.console.browser import page
from tests.serving.fleets import Deployed

pytestmark = pytest.mark.slow

NAME = "textile-line-2"
# A search of two trials, on a machine that may be busy.
PATIENCE_MS = 600_000


@pytest.fixture
def deployed(tmp_path: Path, prompt_set: PromptSet) -> Iterator[Deployed]:
    """A fleet of one product, which takes in whatever gets a champion."""
    stack = LocalStack(tmp_path / "stack")
    stack.start()
    try:
        fleet = Deployed(stack=stack, port=free_ports(1)[0], folder=tmp_path)
        fleet.register(prompt_set, "washer")
        environment = stack.environment
        done = fleet.deploy(
            {
                "categories": "all",
                "pools": {"tail": {"autoscaling": {"max_replicas": 1}, "max_wait_s": 20}},
                "pool": "tail",
                "registry": {"poll_s": 1, "cache": str(tmp_path / "cache")}
                | {"page": environment["MLFLOW_TRACKING_URI"]},
                "searches": {"folder": str(tmp_path / "searches")}
                | {"dashboard": environment["RAY_API_SERVER_ADDRESS"]},
            }
        )
        assert done.returncode == 0, done.stderr
        yield fleet
    finally:
        stack.stop()


@pytest.mark.timeout(1800)
def test_ten_good_images_become_a_verdict(
    browser: Browser, deployed: Deployed, sample_data: Path
) -> None:
    (textile,) = [each for each in find_categories(sample_data) if each.name == "textile"]
    good = [Path(str(path)) for path in textile.good[:10]]
    bad = next(image.path for image in textile.test if image.is_anomalous)
    started = time.monotonic()

    def tell(line: str) -> None:
        """For the transcript in docs/operating.md; `pytest -s` shows it."""
        print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)

    with page(browser, deployed.url) as tab:
        tab.set_default_timeout(60_000)
        tab.goto("/")
        tab.get_by_role("button", name="New product").click()
        tab.get_by_label("Name").fill(NAME)
        tab.get_by_role("button", name="Next").click()
        notice = tab.get_by_text("serves it as soon as a version is promoted")
        expect(notice).to_be_visible()
        tell(f"Fleet, New product, {NAME}, Next: the tab Tune says that it is not served yet")
        tab.get_by_label("Images", exact=True).set_input_files(good)
        expect(tab.locator(".training img").nth(9)).to_be_visible()
        tell("ten good images chosen: they are seen, each with its Strike out")
        tab.get_by_role("button", name="Strike out image 10").click()
        expect(tab.locator(".training img")).to_have_count(9)
        tab.get_by_label("Trials").fill("2")
        tab.get_by_role("button", name="Estimate").click()
        estimate = tab.locator(".estimate b")
        expect(estimate).to_be_visible(timeout=PATIENCE_MS)
        tell(f"one struck out, 4 shots, 2 trials, Estimate: {estimate.inner_text()}")
        tab.get_by_role("button", name="Search", exact=True).click()
        view = tab.get_by_role("region", name="Last search")
        expect(view.locator("dd").nth(1)).to_contain_text("0.", timeout=PATIENCE_MS)
        best = view.locator("dd").nth(1).inner_text()
        tell(f"Search: the first value, {best}")
        expect(view.get_by_text("Done", exact=True)).to_be_visible(timeout=PATIENCE_MS)
        outcome = tab.get_by_role("region", name="What came of it")
        expect(outcome).to_contain_text("of the last search")
        expect(outcome.locator(".pictures img").nth(4)).to_be_visible()
        pictures = outcome.locator(".pictures img").count()
        ended = " ".join(each.inner_text() for each in view.locator("dd").all())
        tell(f"Done ({ended}): candidate v1 with {pictures} pictures, links to MLflow and Ray")
        for link in (outcome.get_by_role("link", name="MLflow"), view.get_by_role("link")):
            assert (link.get_attribute("href") or "").startswith("http://127.0.0.1:")
        outcome.get_by_role("button", name="Promote v1").click()
        dialog = tab.get_by_role("dialog")
        dialog.get_by_label("Reason").fill("The first of its line")
        dialog.get_by_role("button", name="Promote").click()
        expect(outcome).to_contain_text("Version 1 serves", timeout=PATIENCE_MS)
        tell("Promote, with the reason: version 1 serves")
        expect(notice).to_have_count(0, timeout=PATIENCE_MS)
        inspect = tab.get_by_role("link", name="Inspect images")
        expect(inspect).to_be_visible(timeout=PATIENCE_MS)
        tell("the fleet has taken it in")
        inspect.click()
        tab.get_by_label("Images", exact=True).set_input_files(str(bad))
        verdict = tab.locator(".verdict.large")
        expect(verdict).to_have_text("Defective", timeout=PATIENCE_MS)
        score = tab.locator("output.figure").inner_text()
        tell(f"Inspect images, a textile with a defect: Defective, {score}")
        tab.get_by_role("link", name="Searches").click()
        expect(tab.locator("table.list tbody tr")).to_have_count(2)
    assert deployed.get("/v1")["categories"][0]["category"] == NAME
