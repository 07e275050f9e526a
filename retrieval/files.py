"""The index's files: checked by size and sha256 when read; what a killed writer left is removed."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matvit.durable import TEMPORARY
from matvit.regular import check_regular
from retrieval.errors import DamagedFileError, DiskRefusalError, IndexFormatError, IngestError

RESTORE = "try matvit repair, which never makes it worse, or restore the index from a copy"


def sha256_bytes(data: bytes) -> str:
    """Lower-case hex digest."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left unfinished in `folder`. Call it only while holding the writer's lock."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's complaints about one of the index's files into IndexFormatError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedFileError(what="a file of the index is missing", where=str(path), fix=RESTORE) from error
    except OSError as error:
        raise IndexFormatError(
            what=f"a file of the index cannot be read ({error.strerror})",
            where=str(path),
            fix="check the disk and the file's permissions",
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a disk's refusal (full, read-only, gone) into DiskRefusalError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DiskRefusalError(
            what=f"the index cannot be written ({reason})",
            where=str(folder),
            fix="make room or mend the permissions, then run the same again: nothing that was published is lost",
        ) from error


def check_size(path: Path, *, size: int) -> None:
    """Raises IndexFormatError unless the file is there with so many bytes."""
    with reading(path):
        found = check_regular(path).st_size
    if found != size:
        raise damaged(path, f"has {found} bytes instead of {size}")


@contextmanager
def keeping_lists() -> Iterator[None]:
    """Turn a refusal to SQLite's private databases, which large lists of files are kept in, into IngestError."""
    try:
        yield
    except sqlite3.Error as error:
        raise IngestError(
            what=f"the list of files cannot be kept ({error})",
            where="temporary folder",
            fix="make room there, or set SQLITE_TMPDIR to another, and run the same again: nothing published is lost",
        ) from error


def check_file(path: Path, *, size: int, sha256: str) -> None:
    """Raises IndexFormatError unless the file is there with exactly this content."""
    check_size(path, size=size)
    with reading(path):
        if sha256_file(path) != sha256:
            raise damaged(path, "is not what was written (its sha256 differs)")


class CheckedOnce:
    """A file whose content is compared with its sha256 before it is first used, and not again."""

    def __init__(self, path: Path, *, size: int, sha256: str) -> None:
        """Raises IndexFormatError unless the file is there with so many bytes."""
        check_size(path, size=size)
        self._path, self._size, self._sha256 = path, size, sha256
        self._checked = False

    def path(self) -> Path:
        """Where it is. Raises IndexFormatError unless it holds what was written."""
        if not self._checked:
            check_file(self._path, size=self._size, sha256=self._sha256)
            self._checked = True
        return self._path


def damaged(path: Path, what: str) -> DamagedFileError:
    """The error for a file that fails a check."""
    return DamagedFileError(what=f"the file {what}", where=str(path), fix=RESTORE)
