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
from matvit.walk import walk_files
from retrieval.errors import IngestError
from retrieval.loading import os_reason
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
    _real: dict[str, str] = field(default_factory=dict)  # folder -> its real path
    _seen: set[str] = field(default_factory=set)  # real paths of folders that were walked, and of files

    def add_file(self, path: str) -> None:
        """Take a file, once: also if links lead to its folder by several names."""
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        if self._is_new(os.path.join(self._real[folder], name)):
            self.files[path] = None

    def add_folder(self, folder: str) -> None:
        """Take the pictures below a folder, each folder once."""

        def leave_out(path: str) -> bool:
            return is_index(Path(path)) or not self._is_new(os.path.join(os.path.realpath(path), ""))

        for path in walk_files(folder, on_error=self._skip_folder, leave_out=leave_out):
            if os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES:
                self.add_file(path)

    def folders_below(self, folder: str) -> list[str]:
        """This folder and those below it, each once, by its own name if it has one there."""
        folders: list[str] = []

        def leave_out(path: str) -> bool:
            if is_index(Path(path)):
                return True
            folders.append(path)
            return False

        walk_files(folder, on_error=self._skip_folder, leave_out=leave_out)
        return folders

    def _skip_folder(self, error: OSError) -> None:
        reason = f"folder cannot be read ({error.strerror})"
        folder = SkippedFile(path=Path(os.path.abspath(os.fsdecode(error.filename))), reason=reason)
        if folder not in self.skipped:
            self.skipped.append(folder)

    def _is_new(self, real_path: str) -> bool:
        before = len(self._seen)
        self._seen.add(real_path)
        return len(self._seen) > before


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
        raise _nothing(named, found.skipped)
    return found


def _add(found: Found, name: str) -> None:
    path = os.path.abspath(name)
    error = lstat_error(path)
    if error is None:
        _add_existing(found, path)
    elif glob.has_magic(name):
        base = os.path.abspath(os.path.dirname(re.split(r"[*?\[]", name, maxsplit=1)[0]))
        _note_folder(found, base)
        for match in _matches(found, name, base=base):
            _add_existing(found, match)
    else:
        listed = found.missing if is_gone(error) else found.skipped
        listed.append(SkippedFile(path=Path(path), reason=os_reason(error)))


def _matches(found: Found, pattern: str, *, base: str) -> list[str]:
    """Absolute paths; those through links below `base` last, so that a file is known by its own name."""
    real_base = os.path.realpath(base)

    def order(path: str) -> tuple[bool, str]:
        return os.path.realpath(path) != os.path.normpath(os.path.join(real_base, os.path.relpath(path, base))), path

    return sorted(map(os.path.abspath, _glob(found, pattern)), key=order)


def _glob(found: Found, pattern: str) -> list[str]:
    """What the pattern matches; `**` is any folders, each once: glob's own would follow links in circles."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    head, rest = "/".join(parts[:place]), "/".join(parts[place + 1 :])
    bases = glob.glob(head or ("/" if place else "."))
    folders = [folder for base in bases if os.path.isdir(base) for folder in found.folders_below(base)]
    if not rest:
        return folders
    return [match for folder in folders for match in _glob(found, os.path.join(glob.escape(folder), rest))]


def lstat_error(path: str) -> OSError | None:
    """Why nothing can be said to be at `path`; None when something is."""
    try:
        os.lstat(path)
    except OSError as error:
        return error
    return None


def is_gone(error: OSError | None) -> bool:
    """Whether it says that the file is not there; a folder or a disk that refuses says nothing about its files."""
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _add_existing(found: Found, path: str) -> None:
    if os.path.isdir(path):
        _note_folder(found, path)
        found.add_folder(path)
    else:
        found.bases.append(os.path.dirname(path))
        found.add_file(path)


def _note_folder(found: Found, folder: str) -> None:
    found.bases.append(folder)
    found.scopes.append(folder)


def _nothing(named: list[str], skipped: list[SkippedFile]) -> IngestError:
    if skipped:
        first_skipped = skipped[0]
        return IngestError(
            what=first_skipped.reason, where=os.fspath(first_skipped.path), fix="check the disk and the permissions"
        )
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
