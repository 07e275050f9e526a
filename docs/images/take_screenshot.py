"""Photographs the page for the README: `matvit demo` in one shell, then this script in another.

    python docs/images/take_screenshot.py http://127.0.0.1:8501 docs/images/page.png

Needs Playwright and a Chromium on the path.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
MAX_BYTES = 200_000


def main(url: str, out: Path) -> None:
    """Writes the page, wide and light, as a PNG of 256 colours."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver, driver.chromium.launch(executable_path=chromium, args=FLAGS) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1800}, color_scheme="light")
        page.goto(url)
        page.get_by_role("button", name="Umbrella").click(timeout=60_000)
        page.locator(".st-key-query", has_text="Umbrella").wait_for(timeout=60_000)
        page.mouse.move(0, 0)
        page.locator("[data-testid=stVegaLiteChart] :is(canvas, svg)").first.wait_for(timeout=60_000)
        page.wait_for_timeout(3000)  # until nothing moves
        shot = Image.open(io.BytesIO(page.screenshot()))
    width = 760
    while True:
        small = shot.convert("RGB").resize((width, shot.height * width // shot.width), Image.Resampling.LANCZOS)
        small.quantize(256).save(out, optimize=True)
        if out.stat().st_size <= MAX_BYTES:
            return
        width -= 40


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
