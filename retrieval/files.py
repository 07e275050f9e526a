"""The index's files: checked by size and sha256 when read; what a killed writer left is removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matvit.durable import TEMPORARY
from matvit.regular import NotOursError, check_regular
from retrieval.errors import DamagedFileError, DiskRefusalError, IndexFormatError, IngestError
from retrieval.locations import is_url

RESTORE = "try matvit repair, which never makes it worse, or restore the index from a copy"
FREE = "close what else is running, or allow more open files (ulimit -n), and run the same again"


def index_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of an index. Raises IndexFormatError for what can be no folder's name, and for a URL."""
    try:
        folder = Path(path)
        if b"\0" in (name := os.fsencode(folder)):
            raise ValueError
    except (TypeError, ValueError) as error:
        what = f"{path!r} is no folder's name"
        raise IndexFormatError(what=what, where="index", fix="give a text or a Path") from error
    url = os.fsdecode(name).replace(":/", "://", 1)  # Path folds the slashes
    if is_url(url):  # it would become a folder named "s3:"
        raise IndexFormatError(
            what="is a URL, but an index lies in a folder of this computer", where=url, fix="give a folder's path"
        )
    try:
        return folder.absolute()
    except FileNotFoundError as error:
        what = "the working directory is not there any more"
        raise IndexFormatError(what=what, where=str(folder), fix="give an absolute path, or change to one") from error


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
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def exhausted(error: BaseException | None) -> bool:
    """Whether the system had no more memory or open files to give: that says nothing about what was to be read."""
    none_left = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    seen: set[int] = set()  # causes may go round in circles
    while error is not None and id(error) not in seen:
        if getattr(error, "errno", None) in none_left:
            return True
        seen.add(id(error))
        error = error.__cause__
    return False


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's complaints about one of the index's files into IndexFormatError.

    DamagedFileError where reading it again would not help, which is what `matvit repair` mends.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedFileError(what="a file of the index is missing", where=str(path), fix=RESTORE) from error
    except NotOursError as error:
        raise damaged(path, f"cannot be the index's own ({error.strerror})") from error
    except OSError as error:
        what = f"a file of the index cannot be read ({error.strerror})"
        if error.errno == errno.EIO:
            raise DamagedFileError(what=what, where=str(path), fix=f"check the disk, then {RESTORE}") from error
        fix = FREE if exhausted(error) else "check the disk and the file's permissions"
        raise IndexFormatError(what=what, where=str(path), fix=fix) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a disk's refusal (full, read-only, gone) into DiskRefusalError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        fix = FREE if exhausted(error) else "make room or mend the permissions, then run the same again"
        raise DiskRefusalError(
            what=f"the index cannot be written ({reason})",
            where=str(folder),
            fix=f"{fix}: nothing that was published is lost",
        ) from error


def check_kind(path: Path, *, folder: bool) -> None:
    """Raises DamagedFileError where something else stands in the place of a folder, or a file, of the index at hand.

    A link does, too: a writer empties folders of what it did not write.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # whoever needs it is told
        return
    kind = "folder" if folder else "regular file"
    if stat.S_ISLNK(mode):
        raise wrong_kind(path, f"is a link, not a {kind}")
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise wrong_kind(path, f"is not a {kind}")


def wrong_kind(path: Path, what: str) -> DamagedFileError:
    """The error for what cannot be a part of the index at hand."""
    return DamagedFileError(
        what=what,
        where=str(path),
        fix=f"put the index's own in its place, or move it away and run: matvit repair {path.parent}",
    )


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
