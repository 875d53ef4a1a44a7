"""The console in headless Chromium: `python -m benchmarks.console [--json FILE]`.

A fleet in this process, on loopback, without Ray: the first paint, from drop to overlay for a large
JPEG file, and what an update of a thousand categories takes of the page's main thread.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page

from apt_ray.detection.prompt_set import PromptSet
from apt_ray.images import ImageLimits
from benchmarks.fleet import CATEGORY, prepare
from benchmarks.rows import Row, compared, write_rows
from serving.controller.orders import Order, StoredVersion
from serving.replica.inspector import Inspector
from serving.settings import Batching
from tests.serving.console.browser import chromium, page
from tests.serving.console.fleets import ConsoleFleet, MemoryController, busy, served

_CATEGORIES = 1000
# What was wanted, in milliseconds.
_PAINT_MS, _OVERLAY_MS, _UPDATE_MS = 500, 1000, 100

# Until the overlay has been painted: two frames after its canvas shows.
_DROP = """async (bytes) => {
    const response = await fetch(bytes);
    const data = new DataTransfer();
    data.items.add(new File([await response.blob()], "part.jpg", { type: "image/jpeg" }));
    const frame = () => new Promise(requestAnimationFrame);
    document.querySelectorAll(".plane canvas").forEach((canvas) => canvas.remove());
    const started = performance.now();
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    for (;;) {
        await frame();
        const canvas = document.querySelector("canvas.layer");
        const isDrawn = canvas && canvas.width > 300 && !canvas.hidden;
        if (isDrawn && document.querySelector("output.figure")) {
            await document.querySelector(".plane img").decode();
            await frame();
            await frame();
            return performance.now() - started;
        }
    }
}"""
_PAINTED = """() => new Promise((done) => new PerformanceObserver((list) => {
    const paint = list.getEntriesByName("first-contentful-paint")[0];
    if (paint) done(paint.startTime);
}).observe({ type: "paint", buffered: true }))"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The console in headless Chromium.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="apt-bench-") as name:
        prompt_set, data = prepare(Path(name), "builtin")
    inspector = Inspector(limits=ImageLimits(), batching=Batching(threads=2), shared=True)
    _load(inspector, prompt_set)
    names = [CATEGORY, *(f"part-{number:04d}" for number in range(1, _CATEGORIES))]
    controller = MemoryController({name: busy(name) for name in names})
    with served(ConsoleFleet(inspector, controller)) as fleet, chromium() as browser:
        rows = [
            *_paints(browser, fleet.url, options.rounds),
            _overlay(browser, fleet, _large(data), options.rounds),
            *_updates(browser, fleet, options.rounds),
        ]
    write_rows(rows, options.json)


def _load(inspector: Inspector, prompt_set: PromptSet) -> None:
    stored = StoredVersion(category=CATEGORY, version=1, run_id="", data=prompt_set.to_bytes())
    inspector.load(CATEGORY, Order(version=1), stored)


def _large(data: bytes) -> bytes:
    """A JPEG file of 12 megapixels with the noise of a sensor."""
    image = (
        Image.open(io.BytesIO(data)).convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
    )
    noise = np.random.default_rng(0).normal(0, 4, (3000, 4000, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _paints(browser: Browser, url: str, rounds: int) -> list[Row]:
    """From nothing, and again with what the browser keeps."""
    first, again, rows = [], [], []
    for _ in range(rounds):
        with page(browser, url) as tab:
            for found in (first, again):
                tab.goto("/")
                found.append(float(tab.evaluate(_PAINTED)))
                tab.locator(".row-link").first.wait_for()
                if found is first:
                    rows.append(float(tab.evaluate("performance.now()")))
    return [
        compared("first paint, nothing kept", statistics.median(first), _PAINT_MS, "ms"),
        compared("first paint, files kept", statistics.median(again), _PAINT_MS, "ms"),
        compared("first rows of 1,000", statistics.median(rows), 2 * _PAINT_MS, "ms"),
    ]


def _overlay(browser: Browser, fleet: ConsoleFleet, data: bytes, rounds: int) -> Row:
    def drop(tab: Page) -> float:
        return float(tab.evaluate(_DROP, "/large.jpg"))

    with page(browser, fleet.url) as tab:
        tab.route("**/large.jpg", lambda route: route.fulfill(body=data, content_type="image/jpeg"))
        tab.goto(f"/c/{CATEGORY}")
        tab.get_by_text("Drop images here").wait_for()
        drop(tab)  # the first image of all also pays for what is used for the first time
        times = [drop(tab) for _ in range(rounds)]
    megabytes = len(data) / 1e6
    name = f"drop to overlay, JPEG of 12 megapixels and {megabytes:.1f} MB"
    return compared(name, statistics.median(times), _OVERLAY_MS, "ms")


def _updates(browser: Browser, fleet: ConsoleFleet, rounds: int) -> list[Row]:
    """Busy time of the page's main thread for one answer in which every category has changed."""
    with page(browser, fleet.url) as tab:
        session = tab.context.new_cdp_session(tab)
        # The processor's time of the thread, not the clock's: whatever else runs does not count.
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def spent_ms() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return float(1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

        def updated(act: Callable[[], object]) -> float:
            with tab.expect_response("**/fleet/status"):
                before = spent_ms()
                act()
            tab.wait_for_timeout(500)
            return spent_ms() - before

        tab.goto("/?sort=-rejected")
        tab.locator(".row-link").first.wait_for()
        tab.wait_for_timeout(1000)
        changed, same = [], []
        for turn in range(rounds):
            for name in fleet.controller.categories:
                fleet.controller.categories[name] = busy(f"{name} {turn}")
            changed.append(updated(lambda: None))
            same.append(updated(lambda: None))
    return [
        compared("an update of 1,000 rows", statistics.median(changed), _UPDATE_MS, "ms"),
        compared("the same with nothing changed", statistics.median(same), _UPDATE_MS, "ms"),
    ]


if __name__ == "__main__":
    main()
