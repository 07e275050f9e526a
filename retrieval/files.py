"""Files that matter: written under a temporary name, synced, renamed; checked by size and sha256 when read."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retrieval.errors import IndexFormatError, IngestError

TEMPORARY = ".tmp-"  # prefix of everything unfinished; the next writer removes it
RESTORE = "restore the index from a copy, or index the pictures again in a new folder"


def sha256_bytes(data: bytes) -> str:
    """Lower-case hex digest."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_name(path: Path) -> Path:
    """Where `path` is built before it is renamed into place."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it. Not atomic: for files inside an unfinished folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment it is the old file or the new one, whole."""
    temporary = temporary_name(path)
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)  # noqa: PTH105 - tests inject failures into os
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the disk has a file that another library wrote."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names."""
    if sys.platform == "win32":  # folders cannot be synced there; NTFS journals the names itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        raise IndexFormatError(what="a file of the index is missing", where=str(path), fix=RESTORE) from error
    except OSError as error:
        raise IndexFormatError(
            what=f"a file of the index cannot be read ({error.strerror})",
            where=str(path),
            fix="check the disk and the file's permissions",
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a disk's refusal (full, read-only, gone) into IngestError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise IngestError(
            what=f"the index cannot be written ({reason})",
            where=str(folder),
            fix="what was published before is intact: make room or mend the permissions, then run the same again",
        ) from error


def check_file(path: Path, *, size: int, sha256: str) -> None:
    """Raises IndexFormatError unless the file is there with exactly this content."""
    with reading(path):
        found = path.stat().st_size
        if found != size:
            raise damaged(path, f"has {found} bytes instead of {size}")
        if sha256_file(path) != sha256:
            raise damaged(path, "is not what was written (its sha256 differs)")


def damaged(path: Path, what: str) -> IndexFormatError:
    """The error for a file that fails a check."""
    return IndexFormatError(what=f"the file {what}", where=str(path), fix=RESTORE)
