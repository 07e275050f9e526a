"""What the installed `matvit` calls: Ctrl-C ends it quietly also while the commands are being loaded."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """See `matvit_app.cli.main.main`."""
    try:
        Path.cwd()
    except FileNotFoundError:
        sys.stderr.write("error: the working directory is not there any more; cd to one that is\n")
        return 2
    try:
        from matvit_app.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130
