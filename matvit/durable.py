"""Files that matter: written under a temporary name, synced, renamed.

Every OSError that is raised here names the file that the caller asked for.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"  # prefix of everything unfinished


def cache_folder() -> Path:
    """Where things that can be made again are kept: `MATVIT_CACHE`, or matvit in the user's cache folder."""
    if given := os.environ.get("MATVIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matvit"


def temporary_name(path: Path) -> Path:
    """Where `path` is built before it is renamed into place."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def write_synced(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file of `pieces` and wait until the disk has it. Not atomic: for files inside an unfinished folder."""
    with _naming(path), path.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment it is the old file or the new one, whole."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Replace files, each atomically; none before all are on the disk, so that a full one parts no pair."""
    temporaries = {path: temporary_name(path) for path in files}
    try:
        for path, data in files.items():
            with _naming(path):
                write_synced(temporaries[path], data)
        for path, temporary in temporaries.items():
            with _naming(path):
                os.replace(temporary, path)  # noqa: PTH105 - tests inject failures into os
    except BaseException:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
    for folder, path in {path.parent: path for path in files}.items():
        with _naming(path):
            sync_folder(folder)


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` left half written beside it."""
    name = re.compile(rf"{re.escape(TEMPORARY)}\d+-{re.escape(path.name)}")
    for left in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        left.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until the disk has a file that another library wrote."""
    with _naming(path), path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names."""
    if sys.platform == "win32":  # folders cannot be synced there; NTFS journals the names itself
        return
    with _naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Those of `write` and `fsync` name no file, those of `replace` the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
