"""Reading files of ours: a pipe or a device in the place of one would be waited for, or read, without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class NotOursError(OSError):
    """What lies there can be no file of ours: reading it another time would not help."""


MOST = 64 * 2**20  # bytes: far more than any config or record has, and than a manifest may


def check_regular(path: Path) -> os.stat_result:
    """The file's status, looked up before it is opened. Raises OSError, NotOursError unless it is a regular file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise NotOursError(errno.EINVAL, "not a regular file", str(path))
    return found


def read_small(path: Path, *, most: int = MOST) -> bytes:
    """The content of a file of at most `most` bytes. Raises OSError, NotOursError for any other."""
    if check_regular(path).st_size > most:
        raise NotOursError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return path.read_bytes()
