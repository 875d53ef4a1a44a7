"""Headless Chromium for the tests of the console, and what every page of it must hold."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.servers import missing

# Debian's, Fedora's and Google's names of it.
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Longer than the console waits between two questions.
_PATIENCE_MS = 20_000
PHONE, TABLET, DESK = (390, 844), (768, 1024), (1440, 900)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser whose camera shows a test card; skips where there is none.

    Playwright keeps an event loop running in this thread: no `asyncio.run` while it is open.
    """
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        missing("Chromium", "install it, on Debian with `apt-get install chromium`")
    arguments = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to sandbox root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Watched:
    """A page, and what it did that no page of the console may do."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.said: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", self._see)

    def _hear(self, message: ConsoleMessage) -> None:
        # The browser itself notes every answer that is an error, expected or not.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.said.append(message.text)

    def _see(self, request: Request) -> None:
        if not request.url.startswith((f"{self.url}/", "blob:", "data:")):
            self.elsewhere.append(request.url)

    def assert_clean(self) -> None:
        assert self.said == []
        assert self.elsewhere == []


@contextmanager
def page(
    browser: Browser,
    url: str,
    *,
    size: tuple[int, int] = DESK,
    dark: bool = False,
    touch: bool = False,
    **options: Any,
) -> Iterator[Page]:
    """A page of a fresh profile at `url`; that it held to the rules is asserted at the end."""
    width, height = size
    context = browser.new_context(
        base_url=url,
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        has_touch=touch,
        **options,
    )
    context.set_default_timeout(_PATIENCE_MS)
    expect.set_options(timeout=_PATIENCE_MS)
    watched = Watched(context.new_page(), url)
    yield watched.page
    watched.assert_clean()
    context.close()
