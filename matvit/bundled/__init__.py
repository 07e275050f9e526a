"""Checkpoints that ship with the package, one folder each."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled_folders() -> dict[str, Path]:
    """Each checkpoint's folder by its name, sorted."""
    entries = resources.files("matvit.bundled").iterdir()
    found = {entry.name: Path(str(entry)) for entry in entries if entry.joinpath("config.json").is_file()}
    return dict(sorted(found.items()))
