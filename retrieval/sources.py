"""Which files are meant: folders, files, patterns, lists, shards, URLs -> places, and the roots that they belong to."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH100, PTH112, PTH118, PTH119, PTH120, PTH122, PTH207

from __future__ import annotations

import errno
import glob
import os
import re
import sqlite3
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from matvit.datasets import PICTURE_SUFFIXES
from matvit.walk import walk_folders
from retrieval.errors import IngestError
from retrieval.files import keeping_lists
from retrieval.lists import Listed, is_list, read_list, read_table
from retrieval.locations import (
    Status,
    filesystem,
    is_url,
    location,
    os_reason,
    remote_errors,
    remote_status,
    split_member,
)
from retrieval.manifest import is_index
from retrieval.shards import ShardError, Table, is_table, is_tar
from retrieval.types import SkippedFile

PathLike = str | os.PathLike[str]
Images = PathLike | Iterable[PathLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """One file that was found: a picture, or one that holds pictures."""

    path: str  # absolute, as `os.fsdecode` gives it, or a URL
    kind: str  # PICTURE, TAR or TABLE
    metadata: str | None  # a JSON object, from a list
    problem: str | None  # why it cannot be taken
    status: Status | None  # of a store that was listed; None: to be asked


_FEW = 1000  # files
PICTURE, TAR, TABLE = "picture", "tar", "table"


class Found:
    """What `find_files` found, each file once: in order, by `files`.

    Kept in a private database of SQLite's, which goes to the disk when it is large.
    """

    def __init__(self) -> None:
        self.bases: dict[str, None] = {}  # folders that the files were named by, in order
        self.scopes: list[str] = []  # folders, and files with pictures in them, that were looked through
        self.skipped: list[SkippedFile] = []  # folders that cannot be read
        self.missing: list[SkippedFile] = []  # named, but not there
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
        query = "SELECT * FROM files WHERE number > ? ORDER BY number LIMIT 1000"
        while rows := self._files.execute(query, (last,)).fetchall():
            for number, _, path, kind, metadata, problem, size, mtime_ns in rows:
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
        """Whether a URL was found."""
        return self._files.execute("SELECT 1 FROM files WHERE real = ?", (os.fsencode(path),)).fetchone() is not None

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
        real = path if is_url(path) else self._real_path(path)
        values = os.fsencode(real), os.fsencode(path), kind, metadata, problem
        times = (None, None) if status is None else (status.size, status.mtime_ns)
        self._files.execute(_INSERT, (*values, *times))

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
            for path in files:
                if _is_picture(path):
                    self.add_file(path)

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

    def note_folder(self, folder: str) -> None:
        """A folder that is looked through."""
        self.bases[folder] = None
        self.scopes.append(folder)

    def _skip_folder(self, error: OSError) -> None:
        self.skip(os.path.abspath(os.fsdecode(error.filename)), f"folder cannot be read ({error.strerror})")

    def skip(self, path: str, reason: str) -> None:
        """Something named that cannot be looked into."""
        folder = SkippedFile(path=Path(path), reason=reason)
        if folder not in self.skipped:
            self.skipped.append(folder)

    def _is_new(self, real_path: str) -> bool:
        before = len(self._walked)
        self._walked.add(real_path)
        return len(self._walked) > before


_FILES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY, real BLOB UNIQUE, path BLOB, kind TEXT, metadata TEXT, problem TEXT,
    size INTEGER, mtime_ns INTEGER
)
"""
_INSERT = """
INSERT INTO files (real, path, kind, metadata, problem, size, mtime_ns) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (real) DO UPDATE SET metadata = excluded.metadata WHERE excluded.metadata IS NOT NULL
"""


def find_files(images: Images | Found, *, delete: bool = False) -> Found:
    """The files that `images` means: a folder, a file, a pattern, a list, a shard, a URL, or several of those.

    Folders are walked with all their sub-folders, links to folders included, each folder once, for files
    that are named like pictures (`matvit.datasets.PICTURE_SUFFIXES`); hidden files and folders and other
    indexes are left out. Named files are taken whatever their name, except lists (.txt, .csv, .parquet with a
    path column), whose pictures are meant, and shards (.tar, .parquet with a column of pictures). A missing
    one among several is listed. Raises IngestError when there is nothing at all, or for a list that is none;
    MissingExtraError for a URL without fsspec, or Parquet without pyarrow.
    `delete`: whether what is gone is to be forgotten; the error then says how, since all of it may only be away.
    """
    if isinstance(images, Found):
        return images
    named = [_text(image) for image in ([images] if isinstance(images, str | os.PathLike) else _several(images))]
    with keeping_lists():
        found = _find(named)
        if not len(found):
            raise _nothing(named, found, delete=delete)
    return found


def _several(images: object) -> Iterable[object]:
    if isinstance(images, bytes) or not isinstance(images, Iterable):  # bytes are many numbers
        raise _no_path(images)
    return images


def _text(image: object) -> str:
    if isinstance(image, str | os.PathLike) and isinstance(text := os.fspath(image), str):
        if not text:  # it would be the whole working directory
            raise IngestError(
                what="an empty name", where="images", fix="name pictures, or '.' for the working directory"
            )
        return text
    raise _no_path(image)


def _no_path(value: object) -> IngestError:
    return IngestError(
        what=f"a {type(value).__name__} names no pictures",
        where="images",
        fix="give a path, a pattern or a URL as text, or several of them",
    )


def _find(named: list[str]) -> Found:
    found = Found()
    for name in named:
        name = location(name)  # noqa: PLW2901 - a URL that went through Path
        if is_url(name):
            _add_url(found, name)
        else:
            _add(found, name)
    return found


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES


def _add(found: Found, name: str) -> None:
    path = os.path.abspath(name)
    error = lstat_error(path)
    if error is None:
        _add_existing(found, path)
    elif glob.has_magic(name):
        base = os.path.abspath(os.path.dirname(re.split(r"[*?\[]", name, maxsplit=1)[0]))
        found.note_folder(base)
        for match in _matches(found, name, base=base):
            _add_existing(found, match)
    else:
        listed = found.missing if is_gone(error) else found.skipped
        listed.append(SkippedFile(path=Path(path), reason=os_reason(error)))


def _add_url(found: Found, url: str) -> None:
    """The files of a store below a URL, or those that a pattern matches."""
    system, path = filesystem(url)
    try:
        with remote_errors():
            if glob.has_magic(path):
                infos = system.glob(path, detail=True)
                found.note_folder(system.unstrip_protocol(re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]))
            elif system.isdir(path):
                infos = system.find(path, detail=True)
                found.note_folder(system.unstrip_protocol(path).rstrip("/"))
            else:
                infos = {path: system.info(path)}
    except OSError as error:
        (found.missing if is_gone(error) else found.skipped).append(
            SkippedFile(path=Path(url), reason=os_reason(error))
        )
        return
    for place, info in sorted(infos.items()):
        one, status = system.unstrip_protocol(place), remote_status(info)
        by_name = len(infos) == 1 or glob.has_magic(path)
        if status.regular and (by_name or _is_picture(one)):
            _add_file(found, one, status=status)


def _add_existing(found: Found, path: str) -> None:
    if os.path.isdir(path):
        found.note_folder(path)
        found.add_folder(path)
    else:
        _add_file(found, path)


def _add_file(found: Found, path: str, *, status: Status | None = None) -> None:
    """A file that was named: a picture, a list or a shard."""
    if is_list(path):
        for line in read_list(path):
            _add_listed(found, line, source=path)
        return
    found.bases[os.path.dirname(path)] = None
    if is_table(path):
        _add_table(found, path, status)
    elif is_tar(path):
        found.scopes.append(path)
        found.add_file(path, kind=TAR, status=status)
    else:
        found.add_file(path, status=status)


def _add_table(found: Found, path: str, status: Status | None) -> None:
    try:
        table = Table(path)
    except ShardError as error:
        found.skip(path, error.reason)
        return
    try:
        if table.image_column is None:
            for line in read_table(table):
                _add_listed(found, line, source=path)
        else:
            found.scopes.append(path)
            found.add_file(path, kind=TABLE, status=status)
    except ShardError as error:
        found.skip(path, error.reason)
    finally:
        table.close()


def _add_listed(found: Found, line: Listed, *, source: str) -> None:
    error = None if is_url(line.path) else lstat_error(line.path)
    if error is not None:
        listed = found.missing if is_gone(error) else found.skipped
        name = os.path.basename(source)
        listed.append(SkippedFile(path=Path(line.path), reason=f"{os_reason(error)} (line {line.line} of {name})"))
        return
    folder = os.path.dirname(source)
    found.bases[folder if is_below(line.path, [folder]) else os.path.dirname(line.path)] = None
    found.add_file(line.path, metadata=line.metadata, problem=line.problem)


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
    except ValueError:  # NUL, or half of a surrogate pair
        return OSError(errno.EINVAL, "no file can have this name")
    return None


def is_gone(error: OSError | None) -> bool:
    """Whether it says that the file is not there; a folder or a disk that refuses says nothing about its files."""
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _nothing(named: list[str], found: Found, *, delete: bool) -> IngestError:
    if found.skipped:
        first_skipped = found.skipped[0]
        return IngestError(
            what=first_skipped.reason,
            where=location(first_skipped.path),
            fix="check the file, the disk and the permissions",
        )
    fix = "name a folder, a file or a pattern that holds pictures"
    if delete:  # an empty folder may be where a disk is not mounted
        fix += (
            "; nothing was forgotten, since a disk may be away: if it is not, matvit delete PATH --index INDEX does it"
        )
    if not named:
        return IngestError(what="no pictures were given", where="images", fix=fix)
    first = named[0]
    if is_list(first) or is_table(first):
        gone = f" ({location(found.missing[0].path)}: {found.missing[0].reason})" if found.missing else ""
        return IngestError(what=f"the list names no picture that is there{gone}", where=first, fix=fix)
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
    """Whether the absolute `path` lies below one of these absolute folders, or in one of these shards."""
    return any(path.startswith((os.path.join(folder, ""), f"{folder}#")) for folder in folders)
