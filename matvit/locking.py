"""One process at a time: an operating-system lock on an open file, gone with its process, never stale."""

from __future__ import annotations

import errno
import os
import sys

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
