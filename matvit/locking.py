"""One process at a time: an operating-system lock on an open file, gone with its process, never stale."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

from matvit.durable import temporary_name
from matvit.regular import NotOursError

_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
HELD = {errno.EWOULDBLOCK, errno.EACCES}  # how the two systems say that another has the lock

if sys.platform == "win32":
    import msvcrt

    def lock(descriptor: int) -> None:
        """Lock the file, at once. Raises OSError: with a number in `HELD` when another has it."""
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the process id, which others must be able to read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def lock(descriptor: int) -> None:
        """Lock the file, at once. Raises OSError: with a number in `HELD` when another has it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_lock(path: Path) -> int:
    """The descriptor of a lock file, made if it is missing, for `lock`. Raises OSError.

    NotOursError where it is a symbolic link, which leads to a file of someone else's, or no file.
    """
    if path.is_symlink():
        raise NotOursError(errno.ELOOP, "a link", str(path))
    descriptor = os.open(path, _OPEN, 0o644)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotOursError(errno.EINVAL, "not a regular file", str(path))


def is_still(path: Path, descriptor: int) -> bool:
    """Whether the file that was opened and locked is the one that others would: none has removed or replaced it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_shared(descriptor: int) -> bool:
    """Whether the file has another name: a folder that was copied by hard links shares its lock with its original."""
    return os.fstat(descriptor).st_nlink > 1


def holder_of(path: Path) -> str:
    """The process id that the lock file names, or "unknown"."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
    except FileNotFoundError:  # it has just gone, and its lock with it
        return "unknown"


def sign(path: Path, descriptor: int) -> None:
    """Name this process in a lock file that it holds. Raises OSError.

    One that is shared is left as it is, and `descriptor` becomes that of a locked one of our own in its place: who has
    opened the one before finds that it `is_still` no more. The file stays when the lock goes: removing it would let two
    processes lock two files of one name.
    """
    if is_shared(descriptor):
        unfinished = temporary_name(path)
        unfinished.unlink(missing_ok=True)
        own = os.open(unfinished, _OPEN | os.O_EXCL, 0o644)
        try:
            lock(own)
            os.replace(unfinished, path)  # noqa: PTH105 - tests inject failures into os
            os.dup2(own, descriptor, inheritable=False)  # the lock goes with it
        finally:
            os.close(own)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
