"""The files below a folder: one walk for data sets and for collections of photographs."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH112

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path


def walk_files(
    folder: str | Path,
    *,
    on_error: Callable[[OSError], object],
    leave_out: Callable[[str], bool] | None = None,
) -> list[str]:
    """Every file below `folder`, sorted; paths begin as `folder` does.

    Links to folders are followed, each folder is read once, however many links lead to it; hidden files
    and folders are left out, and so are folders for which `leave_out(path)` is true. Broken links are
    listed as files. Calls `on_error` with each OSError (its `filename` names the folder) and goes on,
    unless that raises.
    """
    files: list[str] = []
    seen: set[str] = set()
    folders, links = [os.fspath(folder)], deque[str]()
    while folders or links:
        # Links come last, so that a folder inside is known by its own name, not by a link to it.
        current = folders.pop() if folders else links.popleft()
        real = os.path.realpath(current)
        if real in seen or (leave_out is not None and leave_out(current)):
            continue
        seen.add(real)
        try:
            with os.scandir(current) as entries:
                visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            on_error(error)
            continue
        for entry in visible:
            if entry.is_symlink():  # DirEntry.is_dir would raise for a link to itself
                (links if os.path.isdir(entry.path) else files).append(entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            elif entry.is_file():
                files.append(entry.path)
    return sorted(files)
