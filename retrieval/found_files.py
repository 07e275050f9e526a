"""The files that were found for an ingest, each once, kept outside the memory when they are many."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH100, PTH118, PTH120

from __future__ import annotations

import os
import sqlite3
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from matvit.datasets import PICTURE_SUFFIXES
from matvit.walk import walk_folders
from retrieval.locations import Status, is_url, location
from retrieval.manifest import is_index
from retrieval.types import SkippedFile

PICTURE, TAR, TABLE = "picture", "tar", "table"
_FEW = 1000  # files
_PAGE = 1000  # files that are read together


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """One file that was found: a picture, or one that holds pictures."""

    path: str  # absolute, as `os.fsdecode` gives it, or a URL
    kind: str  # PICTURE, TAR or TABLE
    metadata: str | None  # a JSON object, from a list
    problem: str | None  # why it cannot be taken
    status: Status | None  # of a store that was listed; None: to be asked


class FoundFiles:
    """What `find_files` found, each file once: in order, by `files`.

    Kept in a private database of SQLite's, which goes to the disk when it is large.
    """

    def __init__(self) -> None:
        self.bases: dict[str, bool] = {}  # that files were named by, in order; True: a folder or a pattern's base
        self.scopes: list[str] = []  # folders, and files with pictures in them, that were looked through
        self.skipped: list[SkippedFile] = []  # what cannot be read
        self.missing: list[SkippedFile] = []  # named, but not there
        self.stores: set[str] = set()  # that were asked
        self._left_out: set[SkippedFile] = set()  # both
        self._real: dict[str, str] = {}  # folder -> its real path
        self._walked: set[str] = set()  # real paths
        self._files = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._files.close)
        for line in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", _FILES, "BEGIN"):
            self._files.execute(line)

    def __len__(self) -> int:
        """Files; a tar shard counts as one."""
        return int(self._files.execute("SELECT count(*) FROM files").fetchone()[0])

    def files(self) -> Iterator[FoundFile]:
        """Every file, in the order in which it was found."""
        last = 0
        while rows := self._files.execute(_SELECT, (last, _PAGE)).fetchall():
            for number, path, kind, metadata, problem, size, mtime_ns in rows:
                status = None if size is None else Status(size=size, mtime_ns=mtime_ns)
                last = number
                yield FoundFile(path=os.fsdecode(path), kind=kind, metadata=metadata, problem=problem, status=status)

    def total(self) -> int | None:
        """Pictures; None when only reading tar shards tells."""
        kinds = dict(self._files.execute("SELECT kind, count(*) FROM files GROUP BY kind"))
        return None if TAR in kinds or TABLE in kinds else kinds.get(PICTURE, 0)

    def places(self) -> Iterator[str]:
        """Where everything lies that this may be compared with: at or below these, or inside them.

        Many files are not named one by one: the folders that they were named by are around them.
        """
        few = len(self) <= _FEW
        yield from self.scopes
        yield from (location(file.path) for file in self.missing)
        yield from (file.path for file in self.files()) if few else self.bases

    def holds(self, path: str) -> bool:
        """Whether a store has listed a URL."""
        query = "SELECT 1 FROM files WHERE real = ? AND size IS NOT NULL"  # a list may name what is not there
        return self._files.execute(query, (os.fsencode(path),)).fetchone() is not None

    def any_at_or_below(self, place: str) -> bool:
        """Whether any file was found at a place, or below it, by the name that it was found by or by its own."""
        self._files.execute("CREATE INDEX IF NOT EXISTS by_path ON files (path)")
        named, real = os.fsencode(place), os.fsencode(place if is_url(place) else os.path.realpath(place))
        query = "SELECT 1 FROM files WHERE {0} = ? OR ({0} >= ? AND {0} < ?) LIMIT 1"
        for column, name in (("path", named), ("real", named), ("real", real)):
            inside = name.rstrip(b"/")
            if self._files.execute(query.format(column), (name, inside + b"/", inside + b"0")).fetchone():
                return True
        return False

    def add_file(
        self,
        path: str,
        *,
        kind: str = PICTURE,
        metadata: str | None = None,
        problem: str | None = None,
        status: Status | None = None,
    ) -> None:
        """Take a file, once: also if links lead to its folder by several names. A list's metadata are kept."""
        if kind != PICTURE:
            self.scopes.append(path)
        real = path if is_url(path) else self._real_path(path)
        values = os.fsencode(real), None if path == real else os.fsencode(path), kind, metadata, problem
        times = (None, None) if status is None else (status.size, status.mtime_ns)
        self._files.execute(_INSERT, (*values, *times))

    def _add_pictures(self, paths: list[str]) -> None:
        """`add_file` of each, all of one folder: in one call of SQLite's."""
        if paths:
            start = len(os.path.dirname(paths[0]).rstrip(os.sep)) + 1
            folder = os.path.join(os.path.dirname(self._real_path(paths[0])), "")
            same = folder == paths[0][:start]
            real = _encoded(paths if same else [folder + path[start:] for path in paths])
            named = repeat(None) if same else _encoded(paths)
            self._files.executemany(_INSERT_NAMED, zip(real, named, repeat(PICTURE), strict=False))

    def _real_path(self, path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)

    def add_folder(self, folder: str) -> None:
        """Take the pictures below a folder, each folder once."""

        def leave_out(path: str) -> bool:
            return is_index(Path(path)) or not self._is_new(os.path.realpath(path))

        for files in walk_folders(folder, on_error=self._skip_folder, leave_out=leave_out):
            self._add_pictures([path for path in files if is_picture(path)])

    def folders_below(self, folder: str) -> list[str]:
        """This folder and those below it, each once, by its own name if it has one there."""
        folders: list[str] = []

        def leave_out(path: str) -> bool:
            if is_index(Path(path)):
                return True
            folders.append(path)
            return False

        deque(walk_folders(folder, on_error=self._skip_folder, leave_out=leave_out), maxlen=0)
        return folders

    def note_folder(self, folder: str, *, matched: bool = False) -> None:
        """A folder that is looked through: named itself, the base of a pattern, or `matched` by one."""
        self.bases[folder] = not matched or self.bases.get(folder, False)
        self.scopes.append(folder)

    def note_base(self, folder: str) -> None:
        """A folder that a file is named by."""
        self.bases.setdefault(folder, False)

    def _skip_folder(self, error: OSError) -> None:
        self.skip(os.path.abspath(os.fsdecode(error.filename)), f"folder cannot be read ({error.strerror})")

    def skip(self, path: str, reason: str, *, gone: bool = False) -> None:
        """Something named that cannot be looked into, or that is not there."""
        file = SkippedFile(path=Path(path), reason=reason)
        if file not in self._left_out:
            self._left_out.add(file)
            (self.missing if gone else self.skipped).append(file)

    def _is_new(self, real_path: str) -> bool:
        before = len(self._walked)
        self._walked.add(real_path)
        return len(self._walked) > before


_FILES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY, real BLOB UNIQUE, path BLOB, kind TEXT, metadata TEXT, problem TEXT,
    size INTEGER, mtime_ns INTEGER
)
"""  # no path: it is the real one
_INSERT = """
INSERT INTO files (real, path, kind, metadata, problem, size, mtime_ns) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (real) DO UPDATE SET metadata = excluded.metadata WHERE excluded.metadata IS NOT NULL
"""
_INSERT_NAMED = "INSERT OR IGNORE INTO files (real, path, kind) VALUES (?, ?, ?)"
_SELECT = """
SELECT number, coalesce(path, real), kind, metadata, problem, size, mtime_ns FROM files
WHERE number > ? ORDER BY number LIMIT ?
"""


def is_picture(path: str) -> bool:
    """Whether a file is named like a picture (`matvit.datasets.PICTURE_SUFFIXES`)."""
    return path[path.rfind(".") :].lower() in PICTURE_SUFFIXES  # os.path.splitext takes a quarter of finding a file


def _encoded(paths: list[str]) -> list[bytes]:
    """`os.fsencode` of each, which would take a third of the time of finding them."""
    return os.fsencode("\0".join(paths)).split(b"\0")
