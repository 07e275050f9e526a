"""Which files are meant: folders, files and patterns -> absolute paths, and the roots that they belong to."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH100, PTH112, PTH118, PTH119, PTH120, PTH122, PTH207

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matvit.datasets import PICTURE_SUFFIXES
from retrieval.errors import IngestError
from retrieval.manifest import is_index
from retrieval.types import SkippedFile

PathLike = str | os.PathLike[str]
Images = PathLike | Iterable[PathLike]


@dataclass(slots=True)
class Found:
    """What `find_files` found. Paths are absolute strings, as `os.fsdecode` gives them."""

    files: dict[str, None] = field(default_factory=dict)  # an ordered set
    bases: list[str] = field(default_factory=list)  # folders that the files were named by
    scopes: list[str] = field(default_factory=list)  # folders that were looked through
    skipped: list[SkippedFile] = field(default_factory=list)  # folders that cannot be read
    missing: list[SkippedFile] = field(default_factory=list)  # named, but not there


def find_files(images: Images) -> Found:
    """The files that `images` (a folder, a file, a pattern, or several of those) means, in sorted order.

    Folders are walked with all their sub-folders, links to folders included, each folder once, for files
    that are named like pictures (`matvit.datasets.PICTURE_SUFFIXES`); hidden files and folders and other
    indexes are left out. Named files are taken whatever their name. A missing one among several is listed.
    Raises IngestError when there is nothing at all.
    """
    named = [os.fspath(images)] if isinstance(images, str | os.PathLike) else [os.fspath(image) for image in images]
    found = Found()
    for name in named:
        _add(found, name)
    if not found.files:
        raise _nothing(named)
    return found


def _add(found: Found, name: str) -> None:
    path = os.path.abspath(name)
    if os.path.lexists(path):
        _add_existing(found, path)
    elif glob.has_magic(name):
        _note_folder(found, os.path.abspath(os.path.dirname(re.split(r"[*?\[]", name, maxsplit=1)[0])))
        for match in sorted(glob.glob(name, recursive=True)):
            _add_existing(found, os.path.abspath(match))
    else:
        found.missing.append(SkippedFile(path=Path(path), reason="no such file"))


def _add_existing(found: Found, path: str) -> None:
    if os.path.isdir(path):
        _note_folder(found, path)
        found.files.update(dict.fromkeys(_walk(path, found.skipped)))
    else:
        found.bases.append(os.path.dirname(path))
        found.files[path] = None


def _note_folder(found: Found, folder: str) -> None:
    found.bases.append(folder)
    found.scopes.append(folder)


def _walk(folder: str, skipped: list[SkippedFile]) -> list[str]:
    files: list[str] = []
    seen: set[str] = set()
    folders: list[str] = [folder]
    links: list[str] = []
    while folders or links:
        # Links come last, so that a folder inside is known by its own name, not by a link to it.
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        if real in seen or is_index(Path(current)):
            continue
        seen.add(real)
        try:
            with os.scandir(current) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            skipped.append(SkippedFile(path=Path(current), reason=f"folder cannot be read ({error.strerror})"))
            continue
        for entry in sorted(visible, key=lambda entry: entry.name):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in PICTURE_SUFFIXES:
                continue
            elif entry.is_file() or entry.is_symlink():  # a broken link is listed, and then skipped with its reason
                files.append(entry.path)
    return sorted(files)


def _nothing(named: list[str]) -> IngestError:
    fix = "name a folder, a file or a pattern that holds pictures"
    if not named:
        return IngestError(what="no pictures were given", where="images", fix=fix)
    first = named[0]
    if os.path.isdir(first):
        return IngestError(what="holds no pictures", where=f"folder {first}", fix=fix)
    if glob.has_magic(first):
        return IngestError(what="the pattern matches no files", where=first, fix=fix)
    return IngestError(what="no such file or folder", where=first, fix=fix)


class Roots:
    """Named folders that items' paths are relative to. A path belongs to the deepest root around it."""

    def __init__(self, known: Mapping[str, str], bases: Iterable[str]) -> None:
        """Keep the `known` roots, and add one for every base that none of them contains."""
        self.named = dict(known)
        self._by_folder = {folder: name for name, folder in known.items()}
        self._found: dict[str, tuple[str, str]] = {}  # folder -> root's name, its path below that root
        for base in sorted({_printable(base) for base in bases}, key=lambda base: (len(base), base)):
            if self._search(base) is None:
                name = self._new_name(base)
                self.named[name] = base
                self._by_folder[base] = name

    def locate(self, path: str) -> tuple[str, bytes]:
        """An absolute path as its root's name and the bytes of its path below it, "/" between parts."""
        folder, name = os.path.split(path)
        if folder not in self._found:
            root = self._search(folder)
            assert root is not None, "every file lies below one of the bases"
            self._found[folder] = self._by_folder[root], os.path.join(folder, "")[len(os.path.join(root, "")) :]
        root_name, below = self._found[folder]
        return root_name, os.fsencode((below + name).replace(os.sep, "/"))

    def _search(self, folder: str) -> str | None:
        while folder not in self._by_folder:
            parent = os.path.dirname(folder)
            if parent == folder:
                return None
            folder = parent
        return folder

    def _new_name(self, folder: str) -> str:
        stem = os.path.basename(folder) or "root"
        name, number = stem, 2
        while name in self.named:
            name, number = f"{stem}-{number}", number + 1
        return name


def _printable(folder: str) -> str:
    """The deepest folder at or above `folder` whose name is text: the manifest's JSON can hold nothing else."""
    while True:
        try:
            folder.encode("utf-8")
        except UnicodeEncodeError:
            folder = os.path.dirname(folder)
        else:
            return folder


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether the absolute `path` lies below one of these absolute folders."""
    return any(path.startswith(os.path.join(folder, "")) for folder in folders)
