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


pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")]


@pytest.fixture(scope="module")
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


@pytest.fixture
def asked():
    """The URLs that the page has requested."""
    return []


@pytest.fixture
def page(url, asked):
    """The page on a telephone's screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as chrome:
        page = chrome.new_page(viewport={"width": 400, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        playwright.expect(page.locator(".matvit-hit img")).to_have_count(7, timeout=40_000)
        yield page


def test_a_person_picks_a_picture_and_an_encoder_and_goes_on_from_a_hit(page):
    from playwright.sync_api import expect

    query = page.locator(".st-key-query")
    page.get_by_role("button", name="dogs/3", exact=True).click()
    expect(query).to_contain_text("dogs/3.png", timeout=20_000)
    _choose_encoder(page, "XL")
    expect(page.get_by_text("Time with XL")).to_be_visible(timeout=20_000)
    _choose_encoder(page, "S")
    expect(page.get_by_text("Time with S")).to_be_visible(timeout=20_000)
    expect(page.get_by_text(re.compile(r"^\d+ of 7$"))).to_be_visible()
    page.wait_for_selector("[data-test-script-state=notRunning]")  # or the hit read is one of the answer before
    first = page.locator(".matvit-name").first.inner_text()
    page.get_by_role("button", name="Search with this").first.click()
    expect(query).to_contain_text(first, timeout=20_000)
    expect(page.locator(".matvit-name", has_text=first)).to_have_count(0, timeout=20_000)  # not itself
    expect(page.locator(".matvit-hit")).to_have_count(7)
    # Nothing sticks out at the side of a telephone's screen.
    assert page.evaluate("document.querySelector('.stMain').scrollWidth <= window.innerWidth")


def test_every_picture_has_its_name_and_an_uploads_goes_with_it(page, photos, tmp_path):
    from playwright.sync_api import expect

    uploader, query = page.get_by_test_id("stFileUploader"), page.locator(".st-key-query")
    shutil.copy(photos / "dogs" / "2.png", tmp_path / "my dog.png")
    uploader.locator("input").set_input_files(tmp_path / "my dog.png")
    expect(uploader).to_contain_text("my dog.png")
    expect(query.get_by_role("img", name="my dog.png")).to_be_visible(timeout=20_000)
    page.wait_for_selector("[data-test-script-state=notRunning]")
    named = page.locator(".stMain img").evaluate_all("all => all.map(one => one.alt)")
    offered = [f"{kind}/{number}" for kind in ("cats", "dogs") for number in range(4)]
    assert sorted(named) == sorted([*offered, *(f"{name}.png" for name in offered), "my dog.png"])
    page.get_by_role("button", name="cats/3", exact=True).click()
    expect(query).to_contain_text("cats/3.png", timeout=20_000)
    expect(uploader.filter(has_text="my dog.png")).to_have_count(0)  # the old one may fade beside the new


def test_the_page_asks_nothing_of_the_internet(page, url, asked):
    page.locator("[data-testid=stVegaLiteChart] :is(canvas, svg)").first.wait_for(timeout=40_000)
    page.wait_for_timeout(1000)  # fonts and icons come last
    assert f"{url}/" in asked
    assert [one for one in asked if not one.startswith((f"{url}/", "data:", "blob:"))] == []


def _choose_encoder(page: Page, name: str) -> None:
    page.locator(".st-key-encoder").get_by_role("combobox").click()
    page.get_by_role("option", name=re.compile(f"^{name} ")).click()
