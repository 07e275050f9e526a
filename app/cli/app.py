"""`matvit app`: the page in a browser."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from matvit.errors import MatVitError, MissingExtraError
from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, write_json

PAGE = Path(__file__).resolve().parents[1] / "ui" / "main.py"
HOST, PORT = "127.0.0.1", 8501
_START_SECONDS = 60.0

Host = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")]


def app(
    index: Annotated[
        Path | None,
        typer.Argument(help="The index.", show_default="photos.index in this folder, or else the demo"),
    ] = None,
    *,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="What the encoders are cut from, such as an adapted checkpoint.",
            show_default="what built the index",
        ),
    ] = None,
    host: Host = HOST,
    port: Port = PORT,
    no_browser: NoBrowser = False,
    json: JsonFlag = False,
) -> None:
    """Open the page in a browser; Ctrl-C ends it.

    Pick a picture and an encoder, and see what is found and what it cost.

    \b
    Examples:
      matvit app
      matvit app products.index --port 8600
      matvit app products.index --checkpoint adapted/
    """
    if index is None and services.DEFAULT_INDEX.exists():
        index = services.DEFAULT_INDEX
    serve(index, checkpoint=checkpoint, host=host, port=port, browser=not no_browser, json=json)


def serve(
    index: Path | None, *, checkpoint: str | None = None, host: str, port: int, browser: bool, json: bool
) -> None:
    """Run the page until it ends or Ctrl-C; `index` None shows the demo.

    Raises MatVitError for an index or a checkpoint that cannot be opened, a missing extra, or a port that is taken.
    """
    check_can_serve(host=host, port=port)
    if index is not None:
        services.index_info(index)  # or the page would open, only to say that it cannot show it
    if checkpoint is not None:
        services.load_encoder(checkpoint)
    # Python's default would end this process at once and leave the server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    url = _url(host, port)
    command, environment = _command(host, port), _environment(index, checkpoint)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603 (our own arguments)
    try:
        _wait_until_ready(server, host=host, port=port)
        if json:
            write_json({"url": url, "index": None if index is None else str(index)})
            sys.stdout.flush()
        say(f"The page is at {url} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(url)
        server.wait()
    except KeyboardInterrupt:
        pass  # the usual way to end it
    finally:
        # It has nothing to save, and an end of its own may meet threads at work in C++, which then abort, and say so.
        server.kill()
        server.wait()


def check_can_serve(*, host: str, port: int) -> None:
    """Raises MissingExtraError without Streamlit, and MatVitError when nothing can listen at `host`:`port`."""
    if find_spec("streamlit") is None:
        raise MissingExtraError.for_extra("app", purpose="the page")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        no_address = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        raise MatVitError(
            what=f"the page cannot listen there ({getattr(error, 'strerror', None) or error})",
            where=f"{host}:{port}",
            fix=f"give an address of this machine, for example --host {HOST}"
            if no_address
            else f"give another port, for example --port {port % 65535 + 1}",
        ) from error


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _command(host: str, port: int) -> list[str]:
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.maxUploadSize": "512",  # MB, as much as a picture's file may have
        "server.headless": "true",  # or a first run stops to ask for an e-mail
        "browser.gatherUsageStats": "false",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(PAGE), *flags]


def _environment(index: Path | None, checkpoint: str | None) -> dict[str, str]:
    ours = {"MATVIT_INDEX": None if index is None else str(index.resolve()), "MATVIT_CHECKPOINT": checkpoint}
    others = {name: value for name, value in os.environ.items() if name not in ours}
    return others | {name: value for name, value in ours.items() if value is not None}


def _wait_until_ready(server: subprocess.Popen[bytes], *, host: str, port: int) -> None:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (a name to look up)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's page
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with direct.open(f"{_url(local, port)}/_stcore/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise MatVitError(
        what="the page did not start",
        where=_url(host, port),
        fix="see Streamlit's message above, or run: matvit doctor",
    )
