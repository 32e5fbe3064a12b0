"""Pages in a real browser: Chromium, driven by Playwright (fixtures ``browser`` and ``visit``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser: the system's, or the one of ``playwright install``.

    Without one the test is skipped. One that is there and does not start is an error.
    """
    driver = pytest.importorskip("playwright.sync_api", reason="the test extra is not installed")
    with driver.sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, NAMES)), None)
        if system is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        with playwright.chromium.launch(executable_path=system) as browser:
            yield browser


class Visits:
    """Opens local pages, and notes what a reader without a network, or with a narrow screen, would suffer from."""

    def __init__(self, browser: Any) -> None:
        self.browser, self.pages, self.heard = browser, [], []

    def __call__(self, path: Path, width: int = 1280, height: int = 900, **context: Any) -> Any:
        """The page, in a window of so many CSS pixels; `context` as of Playwright's ``new_context``."""
        page = self.browser.new_context(viewport=dict(width=width, height=height), **context).new_page()
        page.set_default_timeout(60_000)  # of a machine that is busy
        address = path.resolve().as_uri()
        page.on("console", lambda said: self.heard.append(f"console, {said.type}: {said.text}"))
        page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        page.on("request", lambda request: self._ask(request.url, address))
        page.goto(address)
        self.pages.append(page)
        return page

    def _ask(self, url: str, address: str) -> None:
        if url.partition("#")[0] != address and not url.startswith(("data:", "blob:")):
            self.heard.append(f"request: {url}")

    def complaints(self) -> list[str]:
        """What was said on the console, raised, asked for beyond the page itself, or sticks out of the window."""
        script = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        widths = [page.evaluate(script) for page in self.pages]
        return self.heard + [f"{needs} px wide, of which {has} show" for needs, has in widths if needs > has]

    def close(self) -> None:
        for page in self.pages:
            page.context.close()
