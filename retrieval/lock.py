"""One writer at a time: an operating-system lock, gone with its process, never stale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matvit.locking import HELD, holder_of, is_shared, is_still, lock, open_lock, sign
from matvit.regular import NotOursError
from retrieval.errors import IndexLockedError, IngestError
from retrieval.files import check_kind, writing, wrong_kind
from retrieval.manifest import LOCK


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the index for writing. Raises IndexLockedError (names the holder's process id) or IngestError.

    DamagedFileError where the lock is no file, or a link to one: it would be overwritten.
    """
    path = folder / LOCK
    check_kind(path, folder=False)
    with writing(folder):
        try:
            descriptor = open_lock(path)
        except NotOursError as error:
            raise wrong_kind(path, f"is {error.strerror}") from error
        except FileNotFoundError as error:
            raise _removed(folder) from error
    try:
        try:
            lock(descriptor)
        except OSError as error:
            if error.errno not in HELD:
                raise IngestError(
                    what=f"the index cannot be locked for writing ({error.strerror})",
                    where=str(folder),
                    fix="put it where the file system has locks, such as a local disk",
                ) from error
            or_other = ", or to one that shares files with it (cp -l)" if is_shared(descriptor) else ""
            raise IndexLockedError(
                what=f"process {holder_of(path)} is writing to this index{or_other}",
                where=str(folder),
                fix="wait until it is done, or stop it",
            ) from error
        if not is_still(path, descriptor):
            raise _removed(folder)
        with writing(folder):
            sign(path, descriptor)
        yield
    finally:
        os.close(descriptor)


def _removed(folder: Path) -> IndexLockedError:
    return IndexLockedError(
        what="another process has just removed this index", where=str(folder), fix="run the same again"
    )
