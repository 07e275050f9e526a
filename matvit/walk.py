"""The files below a folder: one walk for data sets and for collections of photographs."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH112

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path


def walk_files(
    folder: str | Path,
    *,
    on_error: Callable[[OSError], object],
    leave_out: Callable[[str], bool] | None = None,
) -> list[str]:
    """Every file below `folder`, sorted; as `walk_folders` finds them."""
    return sorted(chain.from_iterable(walk_folders(folder, on_error=on_error, leave_out=leave_out)))


def walk_folders(
    folder: str | Path,
    *,
    on_error: Callable[[OSError], object],
    leave_out: Callable[[str], bool] | None = None,
) -> Iterator[list[str]]:
    """The files of every folder from `folder` down, each folder's own sorted; paths begin as `folder` does.

    Links to folders are followed, each folder is read once, however many links lead to it; hidden files
    and folders are left out, and so are folders for which `leave_out(path)` is true. Broken links, pipes,
    sockets and devices are listed as files: whoever opens them says why they cannot be used. Calls `on_error`
    with each OSError (its `filename` names the folder) and goes on, unless that raises.
    """
    seen: set[str] = set()
    folders, links = [os.fspath(folder)], deque[str]()
    while folders or links:
        # Links come last, so that a folder inside is known by its own name, not by a link to it.
        current = folders.pop() if folders else links.popleft()
        real = os.path.realpath(current)
        if real in seen or (leave_out is not None and leave_out(current)):
            continue
        seen.add(real)
        found = _Listing()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        _sort_in(entry, found, on_error)
        except OSError as error:
            on_error(error)
        folders += sorted(found.folders, reverse=True)
        links += sorted(found.links)
        yield sorted(found.files)


@dataclass(slots=True)
class _Listing:
    """One folder's content, by kind."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders


def _sort_in(entry: os.DirEntry[str], found: _Listing, on_error: Callable[[OSError], object]) -> None:
    try:
        if entry.is_symlink():  # DirEntry.is_dir would raise for a link to itself
            (found.links if os.path.isdir(entry.path) else found.files).append(entry.path)
        elif entry.is_dir():
            found.folders.append(entry.path)
        else:
            found.files.append(entry.path)
    except OSError as error:  # a failing disk lists names that it cannot tell the kind of
        on_error(OSError(error.errno, error.strerror, entry.path))
