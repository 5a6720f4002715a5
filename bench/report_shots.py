"""Screenshots of a report in the four variants that readers meet (phone and desktop, light and dark), and its print as PDF.

    python bench/report_shots.py artifacts/MODEL/report.html --out shots/

For each variant: the whole page, cut into pieces of a readable height, and with --figures every figure by itself. Needs the development
dependencies and a Chromium on the PATH. To regenerate the pictures after a change: `emosteer report --model MODEL`, then this script.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
PIECE = 2600


def main() -> None:
    """Reads the command line and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the page that `emosteer report` wrote")
    parser.add_argument("--out", type=Path, default=Path("shots"), help="folder for the pictures")
    parser.add_argument("--figures", action="store_true", help="every figure by itself as well")
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"expected one of {', '.join(BROWSERS)} on the PATH, found none; install chromium")
    from playwright.sync_api import sync_playwright

    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
                page.goto(arguments.report.resolve().as_uri())
                take(page, arguments.out, f"{scheme}-{width}", arguments.figures)
                page.close()
        page = chromium.new_page()
        page.goto(arguments.report.resolve().as_uri())
        page.pdf(path=arguments.out / "print.pdf", format="A4", print_background=False)
        chromium.close()


def take(page: Any, out: Path, name: str, figures: bool) -> None:
    """The whole page in pieces, and perhaps each figure."""
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.viewport_size["width"]
    page.screenshot(path=out / f"{name}-full.png", full_page=True)
    for index, top in enumerate(range(0, height, PIECE)):
        clip = {"x": 0, "y": top, "width": width, "height": min(PIECE, height - top)}
        page.screenshot(path=out / f"{name}-{index:02d}.png", full_page=True, clip=clip)
    if figures:
        for figure in page.locator("figure").all():
            figure.screenshot(path=out / f"{name}-{figure.get_attribute('id')}.png")
    print(f"{name}: {height} px high -> {out}")


if __name__ == "__main__":
    main()
