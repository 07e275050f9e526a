"""The page in a real browser, started as a person starts it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture
def url(index: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A job in the background of a shell script is started with Ctrl-C ignored, and so would be this one.
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from matvit_app.cli.main import main; sys.exit(main())"]
    command += ["app", str(index), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        yield _ready(f"http://127.0.0.1:{port}", server)
    finally:
        server.send_signal(2)  # Ctrl-C
        assert server.wait(timeout=20) == 0


def _ready(url: str, server: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
                return url
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the page did not start")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_person_picks_a_picture_and_an_encoder_and_goes_on_from_a_hit(url):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as chrome:
        page = chrome.new_page(viewport={"width": 400, "height": 900})
        page.goto(url)
        expect, query = playwright.expect, page.locator(".st-key-query")
        expect(page.locator(".matvit-hit img")).to_have_count(7, timeout=40_000)
        page.get_by_role("button", name="3", exact=True).last.click()  # dogs/3.png
        expect(query).to_contain_text("3", timeout=20_000)
        _choose_encoder(page, "XL")
        expect(page.get_by_text("Time with XL")).to_be_visible(timeout=20_000)
        _choose_encoder(page, "S")
        expect(page.get_by_text("Time with S")).to_be_visible(timeout=20_000)
        expect(page.get_by_text(re.compile(r"^\d+ of 7$"))).to_be_visible()
        page.wait_for_selector("[data-test-script-state=notRunning]")  # or the hit read is one of the answer before
        first = page.locator(".matvit-name").first.inner_text()
        page.get_by_role("button", name="Search with this").first.click()
        expect(query).to_contain_text(Path(first).stem, timeout=20_000)
        expect(page.locator(".matvit-name", has_text=first)).to_have_count(0, timeout=20_000)  # not itself
        expect(page.locator(".matvit-hit")).to_have_count(7)
        # Nothing sticks out at the side of a telephone's screen.
        assert page.evaluate("document.querySelector('.stMain').scrollWidth <= window.innerWidth")


def _choose_encoder(page: Page, name: str) -> None:
    page.locator(".st-key-encoder").get_by_role("combobox").click()
    page.get_by_role("option", name=re.compile(f"^{name} ")).click()
