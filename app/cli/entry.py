"""What the installed `matvit` calls: Ctrl-C ends it quietly also while the commands are being loaded."""

from __future__ import annotations


def main() -> int:
    """See `matvit_app.cli.main.main`."""
    try:
        from matvit_app.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130
