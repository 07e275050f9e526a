"""`matvit app` starts a real Streamlit server, says where it is, and takes it along when it ends."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request
import webbrowser

import pytest

from matvit_app.cli import app as app_command


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page that is there at once, in the real one's place."""
    script = tmp_path / "main.py"
    script.write_text("import streamlit as st\nst.write('ready')\n")
    monkeypatch.setattr(app_command, "PAGE", script)


def test_app_serves_opens_the_browser_and_ends_with_ctrl_c(run, page, index, port, monkeypatch):
    opened = []

    def look_then_press_ctrl_c(url):
        opened.append(url)
        monkeypatch.delenv("http_proxy")
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(webbrowser, "open", look_then_press_ctrl_c)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it answers nobody
    done = run("app", index, "--port", port, "--json")
    url = f"http://127.0.0.1:{port}"
    assert (done.code, opened) == (0, [url])
    assert done.json == {"url": url, "index": str(index)}
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_an_ipv6_address_has_its_brackets():
    assert app_command._url("::1", 8000) == "http://[::1]:8000"
    assert app_command._url("localhost", 8000) == "http://localhost:8000"


def test_a_terminated_app_takes_its_server_along(index, port):
    program = [sys.executable, "-c", "import sys; from matvit_app.cli.main import main; sys.exit(main())"]
    command = [*program, "app", str(index), "--port", str(port), "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the JSON document: the page is there
        process.terminate()
        _, told = process.communicate(timeout=30)
        assert process.returncode == 143
    assert b"terminate called" not in told
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)


def test_a_page_that_does_not_start_is_an_error(run, page, port, monkeypatch):
    monkeypatch.setattr(app_command, "PAGE", app_command.PAGE.with_name("gone.py"))
    done = run("app", "--port", port, "--no-browser")
    assert (done.code, done.out) == (2, "")
    assert "the page did not start" in done.err


def test_the_index_reaches_the_page_by_its_absolute_path(index, monkeypatch):
    for name in ("MATVIT_INDEX", "MATVIT_CHECKPOINT"):
        monkeypatch.setenv(name, "of an outer process")
    monkeypatch.chdir(index.parent)
    found = app_command._environment(index, "adapted/")
    assert (found["MATVIT_INDEX"], found["MATVIT_CHECKPOINT"]) == (str(index.resolve()), "adapted/")
    assert not {"MATVIT_INDEX", "MATVIT_CHECKPOINT"} & set(app_command._environment(None, None))
