"""A real headless Chromium for tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)


def require_browser(page: str) -> Any:
    """What drives the browser; skips the tests of a module, with the reason, where there is no browser or nothing to drive it."""
    if BROWSER is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH; install one to test {page} in it", allow_module_level=True)
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it comes with emosteer[dev]")


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """The browser, until the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()
