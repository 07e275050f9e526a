"""The named folders that the places of items are relative to."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH118, PTH119, PTH120

from __future__ import annotations

import os
from collections.abc import Mapping

from retrieval.locations import is_top, split_member

_MANY = 100  # folders, each of a picture that was named: those around them are taken instead


class Roots:
    """Named folders that items' paths are relative to. A path belongs to the deepest root around it."""

    def __init__(self, known: Mapping[str, str], bases: Mapping[str, bool]) -> None:
        """Keep the `known` roots, and add those of the bases that they do not contain: places that are known stay.

        `bases`: folders that files were named by; True for one that was named itself, or is a pattern's base. All
        of these become roots, so that a file is known by the innermost; the folder of a file that was named
        becomes one only where no other root contains it, and where there are many, one around it does.
        """
        self.named = dict(known)
        self._by_folder = {folder: name for name, folder in known.items()}
        self._found: dict[str, tuple[str, str]] = {}  # folder -> root's name, its path below that root
        self._next: dict[str, int] = {}  # by a folder's own name: thousands may share one
        folders = {_printable(base) for base, is_named in bases.items() if is_named}
        for base in sorted((base for base in folders if self._search(base) is None), key=_outermost_first):
            self._add(base)
        others = {base for base in map(_printable, bases) if self._search(base) is None}
        for base in sorted(_fewer(others), key=_outermost_first):
            if self._search(base) is None:
                self._add(base)

    def locate(self, path: str) -> tuple[str, bytes]:
        """An absolute path as its root's name and the bytes of its path below it, "/" between parts."""
        container, member = split_member(path) if "#" in path else (path, None)
        folder, name = os.path.split(container)
        if member is not None:
            name = f"{name}#{member}"
        if folder not in self._found:
            root = self._search(folder)
            assert root is not None, "every file lies below one of the bases"
            self._found[folder] = self._by_folder[root], os.path.join(folder, "")[len(os.path.join(root, "")) :]
        root_name, below = self._found[folder]
        return root_name, os.fsencode((below + name).replace(os.sep, "/"))

    def _add(self, base: str) -> None:
        name = self._new_name(base)
        self.named[name] = base
        self._by_folder[base] = name

    def _search(self, folder: str) -> str | None:
        while folder not in self._by_folder:
            parent = os.path.dirname(folder)
            if parent == folder:
                return None
            folder = parent
        return folder

    def _new_name(self, folder: str) -> str:
        stem = os.path.basename(folder) or "root"
        name, number = stem, self._next.get(stem, 2)
        while name in self.named:
            name, number = f"{stem}-{number}", number + 1
        self._next[stem] = number
        return name


def _outermost_first(folder: str) -> tuple[int, str]:
    return len(folder), folder


def _fewer(folders: set[str]) -> set[str]:
    """At most `_MANY` folders around these, if there are any: a list may name pictures in a million."""
    while len(folders) > _MANY:
        around = {folder if is_top(folder) else os.path.dirname(folder) for folder in folders}
        if around == folders:
            break
        folders = around
    return folders


def _printable(folder: str) -> str:
    """The deepest folder at or above `folder` whose name is text: the manifest's JSON can hold nothing else."""
    while True:
        try:
            folder.encode("utf-8")
        except UnicodeEncodeError:
            folder = os.path.dirname(folder)
        else:
            return folder
