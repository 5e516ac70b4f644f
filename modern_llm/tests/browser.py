"""A real browser for the tests that look at pages; they skip, saying why, where there is none."""

import contextlib
import shutil

import pytest

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]


@contextlib.contextmanager
def chromium_page():
    """A page of a headless Chromium, driven by Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: bash scripts/environment.sh docs,browser")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium or Chrome on this machine")
    with (playwright.sync_playwright() as driver,
          contextlib.closing(driver.chromium.launch(executable_path=path, args=FLAGS)) as browser):
        yield browser.new_page(viewport={"width": 1280, "height": 844})
