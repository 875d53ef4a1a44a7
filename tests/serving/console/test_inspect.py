"""Inspect: images in, verdicts out."""

import csv
import io
import re
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from apt_ray.data.folders import Category
from tests.serving.console.browser import TABLET, page
from tests.serving.console.fleets import ConsoleFleet, WholeFleet, tokens
from tests.serving.console.reach import serious

pytestmark = pytest.mark.timeout(600)


def choose(tab: Page, *paths: Path) -> None:
    tab.get_by_label("Images", exact=True).set_input_files(list(paths))


def defective(category: Category) -> list[Path]:
    return [image.path for image in category.test if image.is_anomalous]


def test_an_image_is_shown_with_its_map_and_why(
    browser: Browser, fleet: ConsoleFleet, category: Category, tmp_path: Path
) -> None:
    # File names are text, whatever they look like.
    part = tmp_path / "<img src=x onerror=alert(1)>.png"
    part.write_bytes(defective(category)[0].read_bytes())
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, part)
        finding = tab.locator(".finding")
        expect(finding).to_contain_text(re.compile("Defective|Good"))
        expect(finding.get_by_role("img")).to_have_attribute(
            "aria-label", re.compile(r"Score 0\.\d+\. Threshold 0\.\d+")
        )
        expect(tab.locator(".file-name")).to_contain_text(part.name)
        expect(tab.get_by_text("Version 7")).to_be_visible()
        tint = tab.locator("canvas.layer").first
        expect(tint).to_be_visible()
        drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, 640, 480).data.some(Boolean)"
        assert tint.evaluate(drawn)

        opacity = tab.get_by_label("Opacity of the map")
        opacity.fill("0.2")
        expect(tint).to_have_css("opacity", "0.2")
        tab.get_by_role("button", name="Side by side").click()
        expect(tab.locator(".pane")).to_have_count(2)
        expect(tab.locator("canvas.layer:visible")).to_have_count(2)  # tint and outline of one
        tab.get_by_role("button", name="Blink").click()
        expect(tint).to_be_hidden()
        expect(tint).to_be_visible()


def test_a_large_image_is_zoomed_and_moved_by_keys_and_by_hand(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, defective(category)[0])
        plane, frame = tab.locator(".plane"), tab.locator(".frame")
        expect(plane).to_be_visible()

        def left() -> float:
            return float(plane.evaluate("plane => plane.getBoundingClientRect().left"))

        def width() -> float:
            return float(plane.evaluate("plane => plane.getBoundingClientRect().width"))

        whole = width()
        frame.focus()
        for _ in range(3):
            frame.press("+")
        assert width() == pytest.approx(whole * 1.6**3, rel=0.01)
        before = left()
        frame.press("ArrowRight")
        assert left() < before
        box = frame.bounding_box()
        assert box is not None
        tab.mouse.move(box["x"] + 100, box["y"] + 100)
        tab.mouse.down()
        tab.mouse.move(box["x"] + 160, box["y"] + 100, steps=3)
        tab.mouse.up()
        assert left() == pytest.approx(before, abs=2)
        tab.keyboard.down(" ")
        expect(tab.locator("canvas.layer:visible")).to_have_count(0)
        tab.keyboard.up(" ")
        frame.press("0")
        assert width() == pytest.approx(whole)
        frame.dblclick()
        assert width() == pytest.approx(3 * whole, rel=0.01)


def test_many_images_become_a_contact_sheet_and_a_download(
    browser: Browser, fleet: ConsoleFleet, category: Category, tmp_path: Path
) -> None:
    junk = tmp_path / "=cmd.png"
    junk.write_bytes(b"no image")
    paths = [*(image.path for image in category.test[:4]), *defective(category)[:2], junk]
    with page(browser, fleet.url, accept_downloads=True) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, *paths)
        cards = tab.locator(".card")
        expect(cards).to_have_count(7)
        expect(tab.locator(".progress.whole")).to_be_attached()
        expect(tab.get_by_text("1 not inspected")).to_be_visible()
        scores = [float(text) for text in cards.locator(".card-line .num").all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 6
        with tab.expect_download() as downloading:
            tab.get_by_role("button", name="Download").click()
        archive = ZipFile(downloading.value.path())
        assert archive.testzip() is None
        rows = list(csv.DictReader(io.StringIO(archive.read("results.csv").decode())))
        assert [row["file"] for row in rows] == [*(path.name for path in paths[:-1]), "'=cmd.png"]
        assert sorted((round(float(row["score"]), 3) for row in rows[:6]), reverse=True) == scores
        assert "image" in rows[-1]["problem"]
        overlays = [name for name in archive.namelist() if name.startswith("overlays/")]
        assert len(overlays) == 6
        assert Image.open(io.BytesIO(archive.read(overlays[0]))).format == "JPEG"

        cards.nth(1).click()
        expect(tab.locator(".finding .figure").first).to_have_text(f"{scores[0]:.3f}")
        tab.get_by_role("button", name="Next image").or_(
            tab.get_by_role("button", name="Previous image")
        ).first.wait_for()
        # What was inspected is still there after a look at another page.
        tab.get_by_role("link", name="Versions").click()
        tab.get_by_role("link", name="Inspect").click()
        expect(cards).to_have_count(7)
        tab.get_by_role("button", name="Clear").click()
        expect(tab.get_by_text("Drop images here")).to_be_visible()


def test_a_bad_image_is_explained_and_the_next_one_is_inspected(
    browser: Browser, fleet: ConsoleFleet, category: Category, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.png"
    junk.write_bytes(b"no image")
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, junk)
        alert = tab.get_by_role("alert")
        expect(alert).to_contain_text("Not an image")
        expect(alert).to_contain_text("Send one undamaged image file")
        choose(tab, category.test[0].path)
        expect(tab.locator(".finding")).to_contain_text(re.compile("Defective|Good"))


def test_a_file_that_the_browser_cannot_show_is_drawn_by_the_fleet(
    browser: Browser, fleet: ConsoleFleet, category: Category, tmp_path: Path
) -> None:
    part = tmp_path / "part.tiff"
    Image.open(category.test[0].path).save(part)
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, part)
        expect(tab.locator(".finding")).to_contain_text(re.compile("Defective|Good"))
        image = tab.locator(".plane img")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_images_are_dropped_pasted_and_taken(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    give = """([name, event]) => new Promise((done) => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 80, height: 60 });
        canvas.toBlob((blob) => {
            const data = new DataTransfer();
            data.items.add(new File([blob], name, { type: "image/png" }));
            const given = event === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
            document.body.dispatchEvent(given);
            done();
        });
    })"""
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        tab.get_by_text("Drop images here").wait_for()
        for name, event in (("dropped.png", "drop"), ("pasted.png", "paste")):
            tab.evaluate(give, [name, event])
            expect(tab.locator(".file-name")).to_contain_text(name)
            expect(tab.locator("output.figure")).to_be_visible()
        tab.get_by_role("button", name="Camera").click()
        tab.get_by_role("button", name="Take", exact=True).click()
        expect(tab.locator(".file-name")).to_contain_text(re.compile("camera .*jpg"))
        expect(tab.locator("output.figure")).to_be_visible()


def test_a_fleet_that_ends_is_told_and_asked_again(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        tab.get_by_text("Drop images here").wait_for()
        tab.route("**/inspect?*", lambda route: route.abort())
        choose(tab, category.test[0].path)
        expect(tab.get_by_role("alert")).to_contain_text("The fleet cannot be reached")
        tab.unroute("**/inspect?*")
        tab.get_by_role("button", name="Try again").click()
        expect(tab.locator("output.figure")).to_be_visible()


def test_a_fleet_with_too_much_to_do_is_asked_when_it_says(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    busy = {
        "status": 503,
        "headers": {"Retry-After": "1", "Content-Type": "application/problem+json"},
        "body": '{"title": "Busy", "detail": "9 images wait", "remedy": "Wait.", "status": 503}',
    }
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        tab.get_by_text("Drop images here").wait_for()
        tab.route("**/inspect?*", lambda route: route.fulfill(**busy), times=1)  # type: ignore[arg-type]
        choose(tab, category.test[0].path)
        expect(tab.locator("output.figure")).to_be_visible()


def test_a_token_for_another_category_inspects_nothing_here(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    fleet.allow(tokens(other=["inspect:nut"]))
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}")
        tab.get_by_label("Access token").fill("other")
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_role("alert").first).to_contain_text(re.compile("Forbidden|Not for this"))


def test_an_unknown_category_is_told_with_those_that_are_known(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    with page(browser, fleet.url) as tab:
        tab.goto("/c/nothing")
        expect(tab.get_by_role("alert")).to_contain_text(category.name)


def test_a_rejected_part_is_explained(
    browser: Browser, whole_fleet: WholeFleet, category: Category
) -> None:
    with page(browser, whole_fleet.url, size=TABLET) as tab:
        tab.goto(f"/c/{category.name}")
        choose(tab, defective(category)[0])
        tint = tab.locator("canvas.layer").first
        expect(tint).to_be_visible()
        usual = tint.evaluate("canvas => canvas.toDataURL()")
        tab.get_by_role("button", name="Why?").click()
        areas = tab.locator(".explained li")
        expect(areas.first).to_be_visible()
        pictures = areas.first.get_by_role("img")
        expect(pictures).to_have_count(2)
        for picture in pictures.all():
            assert picture.evaluate("image => image.naturalWidth") > 0
        expect(areas.first).to_contain_text(re.compile("standard deviations|Good parts differ"))
        expect(areas.first).to_contain_text("Perhaps")
        tab.get_by_role("button", name="Memory").click()
        expect(tab.get_by_text("What no support image explains.")).to_be_visible()
        drawn = "document.querySelector('canvas.layer').toDataURL()"
        tab.wait_for_function(f"before => {drawn} != before", arg=usual)
        assert serious(tab) == []
        tab.get_by_role("button", name="Why?").click()
        expect(areas).to_have_count(0)
        tab.wait_for_function(f"before => {drawn} == before", arg=usual)
