"""A real Chromium, driven by Playwright, that looks at a service on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from service.dashboard.files import STATIC

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium (``tests/install-system.sh`` installs it) until the context ends."""
    path = shutil.which("chromium")
    assert path, "Chromium is missing; sh tests/install-system.sh installs it."
    assert (STATIC / "index.html").exists(), "The pages are not built; make dashboard builds them."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Browser, *, width: int = 1280, height: int = 900, theme: str = "light", **options: Any
) -> Iterator[Page]:
    """A page of a browser without any past; it must end without an error of its own."""
    faults: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, locale="en-GB", **options
    )
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: faults.append(message.text) if "Content Security" in message.text else None,
    )
    try:
        yield page
    finally:
        context.close()
    assert not faults, faults


def log_in(page: Page, url: str, token: str) -> None:
    """Log in as a person would."""
    page.goto(url)
    page.get_by_label("API token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="log out").wait_for()
