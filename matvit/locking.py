"""One process at a time: an operating-system lock on an open file, gone with its process, never stale."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

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

    It will be overwritten: NotOursError where it is a link or of two names, which leads to a file of someone else's.
    """
    if path.is_symlink():
        raise NotOursError(errno.ELOOP, "a link", str(path))
    descriptor = os.open(path, _OPEN, 0o644)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:  # 0: another process has just removed it
        return descriptor
    os.close(descriptor)
    reason = "a file of two names" if stat.S_ISREG(found.st_mode) else "not a regular file"
    raise NotOursError(errno.EINVAL, reason, str(path))


def holder_of(path: Path) -> str:
    """The process id that the lock file names, or "unknown"."""
    return path.read_text(encoding="ascii", errors="replace").strip() or "unknown"


def sign(descriptor: int) -> None:
    """Name this process in a lock file that it holds. Raises OSError.

    The file stays when the lock goes: removing it would let two processes lock two files of one name.
    """
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
