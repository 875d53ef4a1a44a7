"""Draws the console's pages for the documents: `python -m tests.serving.console.screenshots DIR`.

The fleet is a whole one, in this process, on the sample products: fitted, registered, inspected.
Only its searches are made up: none runs, and what they say of trials and time was not measured.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page

from apt_ray.config import FitSettings
from apt_ray.data.folders import Category, find_categories
from apt_ray.data.samples.factory import write_samples
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.features.clip import load_backbone
from apt_ray.features.protocol import Backbone
from apt_ray.files import Location
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import PHONE, TABLET, chromium, page
from tests.serving.console.fleets import WholeFleet, served
from tests.serving.test_tuning import KnownJobs
from tuning.report.sheets import draw_perturbed, draw_support

_DESK = (1280, 800)
# A fleet has more than three categories: each sample product is made on several lines.
_LINES = ("", "-line-2", "-line-3", "-line-4")
_SHOWN = "textile"
_SEARCH = "search-textile-58c1d0aa"
_PATIENCE_MS = 120_000


def main() -> None:
    """Fit, serve, inspect and draw."""
    parser = argparse.ArgumentParser(description="Draw the console's pages.")
    parser.add_argument("out", type=Path, metavar="DIR")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="apt-console-") as name:
        folder = Path(name)
        write_samples(folder / "samples")
        categories = find_categories(folder / "samples")
        fleet = WholeFleet(_registry(categories), folder, jobs=_searches(folder / "searches"))
        with served(fleet), chromium() as browser:
            _inspect(fleet.url, categories)
            shown = next(category for category in categories if category.name == _SHOWN)
            _draw(browser, fleet.url, shown, out)


def _registry(categories: Sequence[Category]) -> FakeRegistry:
    """A champion for each category, and candidates that wait for some."""
    registry, backbone = FakeRegistry(), load_backbone()
    for category in categories:
        good = category.support_set(22, seed=0)
        versions = [
            fit(
                category.name,
                good[:shots],
                FitSettings(steps=steps),
                backbone=backbone,
                calibration=good[8:],
            )
            for shots, steps in ((4, 50), (8, 100))
        ]
        for line in _LINES:
            for version in versions[: 1 if line == _LINES[1] else 2]:
                named = version.with_category(f"{category.name}{line}")
                is_shown = named.category == _SHOWN and version is versions[1]
                drawn = _drawn(backbone, version, good[:8]) if is_shown else {}
                tags = {"ray.submission_id": _SEARCH} if is_shown else {}
                registry.register(named, pictures=drawn, trials=[], tags=tags)
    return registry


def _drawn(
    backbone: Backbone, prompt_set: PromptSet, support: Sequence[Location]
) -> dict[str, Image.Image]:
    """What a search draws of its winner."""
    images = [read_image(path, prompt_set.reading) for path in support]
    return {
        "support_images": draw_support(backbone, prompt_set, images),
        "perturbations": draw_perturbed(backbone, prompt_set, images[0]),
    }


def _searches(folder: Path) -> KnownJobs:
    """One that is done, one that runs, one that failed, and an estimate."""
    jobs, now = KnownJobs(), time.time()
    done = {"trials": 8, "ended": 8, "live": 0, "best": 0.97, "best_sd": 0.01, "left_s": 0.0}
    half = {"trials": 8, "ended": 3, "live": 2, "best": 0.94, "best_sd": 0.02, "left_s": 95.0}
    estimate = {"least_s": 150.0, "most_s": 270.0, "cpu_s": 500.0, "gpu_s": 0.0, "cpus": 2}
    estimate |= {"gpus": 0, "encoded_mib": 60.0}
    for name, category, kind, status, ago_s, took_s, written in (
        ("failed", "washer-line-2", "search", "FAILED", 7000, 9, {}),
        ("estimate", _SHOWN, "estimate", "SUCCEEDED", 1900, 40, {"estimate": estimate}),
        (_SEARCH, _SHOWN, "search", "SUCCEEDED", 1800, 240, {"categories": {_SHOWN: done}}),
        ("half", "blister", "search", "RUNNING", 80, None, {"categories": {"blister": half}}),
    ):
        jobs.submit_job(
            submission_id=name,
            metadata={
                "apt_ray": kind,
                "category": category,
                "by": "line-lead",
                "shots": "8",
                "trials": "8",
            },
        )
        job = jobs.jobs[-1]
        job.status, job.start_time = status, 1000 * (now - ago_s)
        job.end_time = None if took_s is None else job.start_time + 1000 * took_s
        jobs.logs[name] = (
            "error: category washer-line-2 has 5 normal images in /data/washer-line-2, 8 shots were"
            " asked for: add normal images"
        )
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        (folder / "progress" / f"{name}.json").write_text(json.dumps(written))
    return jobs


def _inspect(url: str, categories: Sequence[Category]) -> None:
    """What the lines have made in the last hour: mostly good parts."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for category in categories:
            good = [image.path for image in category.test if not image.is_anomalous]
            bad = [image.path for image in category.test if image.is_anomalous]
            for number, line in enumerate(_LINES):
                some = [*good, *bad[: 1 + 2 * number], *good[: 3 * number]]
                for path in some:
                    answer = client.post(
                        f"/v1/{category.name}{line}/inspect", content=path.read_bytes()
                    )
                    answer.raise_for_status()


def _draw(browser: Browser, url: str, category: Category, out: Path) -> None:
    bad = [image.path for image in category.test if image.is_anomalous]

    def choose(tab: Page, paths: Sequence[Path]) -> None:
        tab.goto(f"/c/{category.name}")
        tab.get_by_label("Images", exact=True).set_input_files(list(paths))

    def verdict(tab: Page) -> None:
        choose(tab, bad[:1])
        tab.locator("output.figure").wait_for(timeout=_PATIENCE_MS)

    with page(browser, url, size=_DESK) as tab:
        for _ in range(2):  # the browser does not wait for a typeface that it has never seen
            tab.goto("/")
            tab.locator(".row-link").first.wait_for()
        _save(tab, out / "fleet.png")
        verdict(tab)
        _save(tab, out / "inspect.jpg")
        tab.get_by_role("button", name="Why?").click()
        tab.locator(".explained li").first.wait_for(timeout=_PATIENCE_MS)
        tab.get_by_role("button", name="Why?").scroll_into_view_if_needed()
        tab.evaluate(
            "scrollBy(0, document.querySelector('.explanation').getBoundingClientRect().top - 80)"
        )
        _save(tab, out / "explain.jpg")
        verdict(tab)
        tab.get_by_role("button", name="Compare with the candidate").click()
        tab.get_by_text("Champion alone").wait_for(timeout=_PATIENCE_MS)
        _save(tab, out / "compare.jpg")
        choose(tab, [image.path for image in category.test[::2]][:20])
        tab.locator(".progress.whole").wait_for(state="attached", timeout=_PATIENCE_MS)
        tab.locator("details.threshold").evaluate("(details) => (details.open = true)")
        slider = tab.get_by_label("Try another")
        slider.fill(str(float(slider.input_value()) * 0.75))
        _save(tab, out / "contact-sheet.jpg")
        tab.goto(f"/c/{category.name}/history")
        tab.locator(".card img").first.wait_for()
        _save(tab, out / "history.jpg")
        tab.goto(f"/c/{category.name}/versions")
        tab.locator("table.list").wait_for()
        _save(tab, out / "versions.png")
        tab.get_by_role("button", name="Promote v").click()
        tab.get_by_label("Reason").fill("Fewer false alarms under the new lamp")
        _save(tab, out / "promote.png")
        tab.goto(f"/c/{category.name}/tune")
        tab.get_by_label("Images", exact=True).set_input_files(
            [Path(str(path)) for path in category.good[:12]]
        )
        tab.locator(".training img").nth(11).wait_for()
        tab.locator(".pictures img").nth(1).wait_for()
        _save(tab, out / "tune.jpg", whole=True)
        tab.goto("/searches")
        tab.locator("table.list").wait_for()
        _save(tab, out / "searches.png")
    with page(browser, url, size=_DESK, dark=True) as tab:
        verdict(tab)
        _save(tab, out / "inspect-dark.jpg")
        tab.goto("/")
        tab.locator(".row-link").first.wait_for()
        _save(tab, out / "fleet-dark.png")
    with page(browser, url, size=TABLET, touch=True) as tab:
        verdict(tab)
        _save(tab, out / "inspect-tablet.jpg")
    with page(browser, url, size=PHONE, touch=True) as tab:
        verdict(tab)
        _save(tab, out / "inspect-phone.jpg")
        tab.goto("/c/blister/tune")
        tab.get_by_label("Last search").scroll_into_view_if_needed()
        _save(tab, out / "tune-phone.jpg")
        tab.goto("/")
        tab.locator(".row-link").first.wait_for()
        _save(tab, out / "fleet-phone.png")


def _save(tab: Page, path: Path, *, whole: bool = False) -> None:
    """What is seen: pages of images as JPEG, all others with few colours."""
    tab.wait_for_timeout(700)
    image = Image.open(io.BytesIO(tab.screenshot(full_page=whole))).convert("RGB")
    if path.suffix == ".jpg":
        image.save(path, quality=70, optimize=True)
    else:
        image.quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
