"""Where a picture's bytes lie: a file, a URL, or a place inside a tar shard or a Parquet table.

A location is text: "/photos/a.jpg", "s3://bucket/a.jpg", "/shards/0.tar#a.jpg", "/tables/0.parquet#17" (a row from 0).
"""

# ruff: noqa: PTH112, PTH113, PTH120 - as text, like all places

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from matvit.errors import ImageError, MatVitError, MissingExtraError
from matvit.preprocess import MAX_FILE_BYTES, TOO_LARGE
from retrieval.errors import IngestError

NO_MEMBER, NO_ROW = "no such member", "no such row"  # of a shard, of a table
_GONE = (404, 410)  # HTTP's words for it
NO_TIME = -1  # of a store that does not tell when a file changed: such files are always read again
_CONTAINER = re.compile(r".\.(?:tar|parquet)(?=#.)", re.IGNORECASE | re.DOTALL)  # its end, before a place inside
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FILE = re.compile(r"(?:file|local):(?://localhost)?/+(?!$|/)", re.IGNORECASE)
_FOLDED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/)(?!/)")  # two letters at least: one is a drive


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What tells whether a file changed."""

    size: int  # bytes
    mtime_ns: int  # NO_TIME when unknown
    regular: bool = True  # no folder, pipe or device


def is_url(name: str) -> bool:
    """Whether `name` is the URL of a store, such as "s3://bucket/photos"."""
    return _URL.match(name) is not None


def location(path: str | os.PathLike[str]) -> str:
    """A hit's or a skipped file's path as text that can be read again: `Path` folds the slashes of a URL.

    A URL of the scheme "file" is the path that it means: "file:///a%20b" is "/a b".
    """
    text = os.fsdecode(path)
    if match := _FILE.match(text):
        return unquote("/" + text[match.end() :], errors="surrogateescape")  # as `os.fsdecode`
    folded = _FOLDED.match(text) and not os.path.lexists(text)  # a folder may have such a name
    return _FOLDED.sub(r"\1/", text, count=1) if folded else text


def split_member(place: str) -> tuple[str, str | None]:
    """A location as the file to open and the place inside it; None for a whole file."""
    ends = [match.end() for match in _CONTAINER.finditer(place)]
    if not ends or os.path.lexists(place):  # a file may have such a name itself
        return place, None
    end = ends[0] if len(ends) == 1 or is_url(place) else _end_of_file(place, ends)
    return place[:end], place[end + 1 :]


def _end_of_file(place: str, ends: Sequence[int]) -> int:
    """Which of several ends, since a folder or a member may be named so, is that of a file."""
    there = (end for end in ends if os.path.isfile(place[:end]))
    around = (end for end in reversed(ends) if os.path.isdir(os.path.dirname(place[:end])))  # the file is gone
    return next(there, next(around, ends[0]))


def is_top(folder: str) -> bool:
    """Whether nothing of the same disk, or store, lies around a folder."""
    around = os.path.dirname(folder)
    return around == folder or (is_url(folder) and not is_url(around))


def folder_of(path: str) -> str:
    """The folder that a picture lies in, below the folder that was indexed or in its shard; "" for none."""
    match = _CONTAINER.search(path)
    return (path if match is None else path[match.end() + 1 :]).rpartition("/")[0]


def status_of(place: str) -> Status:
    """Size and time of a file or URL. Raises OSError, or what `filesystem` raises."""
    if is_url(place):
        system, path = filesystem(place)
        with remote_errors():
            return remote_status(system.info(path))
    try:
        found = os.stat(place)  # noqa: PTH116 - a Path per file would double the time of a rerun
    except ValueError as error:  # a null byte
        raise no_such_name() from error
    return Status(size=found.st_size, mtime_ns=_held(found.st_mtime_ns), regular=stat.S_ISREG(found.st_mode))


def no_such_name() -> OSError:
    """Where the system refuses a name itself, such as one with a null byte, with a ValueError."""
    return OSError(errno.EINVAL, "no file can have this name")


def too_large() -> OSError:
    """For what no picture is as large as."""
    return OSError(errno.EFBIG, TOO_LARGE)


def open_file(place: str) -> BinaryIO:
    """A file or URL, for reading. Raises OSError."""
    if not is_url(place):
        try:
            return open(place, "rb")  # noqa: PTH123 - a Path takes a third of the time
        except ValueError as error:
            raise no_such_name() from error
    try:
        system, path = filesystem(place)
    except IngestError as error:  # of a file in a listing, whose name fsspec takes for two
        raise OSError(errno.EINVAL, error.what) from error
    with remote_errors():
        return cast(BinaryIO, io.BufferedReader(_Remote(system.open(path, "rb"))))


def open_regular(place: str) -> BinaryIO:
    """The same, but no pipe and no device, which would not end. Raises OSError."""
    if not is_url(place):
        _regular_status(place)
    return open_file(place)


def _regular_status(place: str) -> Status:
    """Raises OSError for a pipe or a device: opening a pipe would wait for ever."""
    status = status_of(place)
    if not status.regular:
        raise OSError(errno.EINVAL, "not a regular file")
    return status


def open_with_status(place: str, status: Status | None = None) -> tuple[BinaryIO, Status]:
    """A file, and its size and time now; a URL, whose `status` is known. Raises OSError."""
    file = open_file(place)
    if status is None:
        found = os.fstat(file.fileno())
        status = Status(size=found.st_size, mtime_ns=_held(found.st_mtime_ns))
    return file, status


def open_picture(place: str) -> tuple[BinaryIO, Status]:
    """The encoded bytes of the picture at a location as a file, with the status of its file. Raises OSError."""
    from retrieval.shards import read_member

    container, member = split_member(place)
    status = _regular_status(container)
    if member is None and status.size > MAX_FILE_BYTES:
        raise too_large()
    return open_file(container) if member is None else io.BytesIO(read_member(container, member)), status


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """The encoded bytes of the picture at a location, also as a hit's path has it. Raises ImageError."""
    place = location(path)
    try:
        with open_picture(place)[0] as file:
            return file.read()
    except OSError as error:
        raise ImageError(what=os_reason(error), where=place, fix="put its file back, or index again") from error


def is_virtual(place: str) -> bool:
    """Whether a location is no file of its own: a URL, or a place inside a shard or table."""
    return is_url(place) or split_member(place)[1] is not None


def absolute(place: str) -> str:
    """A location, whatever the current folder."""
    container, member = split_member(place)
    path = container if is_url(container) else os.path.abspath(container)  # noqa: PTH100 - as text, like those of the index
    return path if member is None else f"{path}#{member}"


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises MissingExtraError without fsspec, IngestError for stores inside others ("zip://a::b"), or when the store's
    own package is missing or none is known.
    """
    if "::" in url:
        raise IngestError(what="names a store inside another by '::', which is not read", where=url, fix="unpack it")
    # Of a "file:" that names one, `location` made a path: what is left would be the whole machine.
    if url.lower().startswith(("file:", "local:")) or not url.partition(":")[2].strip("/"):
        raise IngestError(what="names no file", where=url, fix="name one, as in file:///photos")
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingExtraError.for_extra("fsspec", purpose=f"reading {url}") from error
    try:
        system, path = url_to_fs(url)
    except Exception as error:
        raise IngestError(
            what=f"this store cannot be read ({one_line(str(error))})",
            where=url,
            fix="install its package, or copy the files here",
        ) from error
    return system, path


@contextmanager
def remote_errors() -> Iterator[None]:
    """Stores raise their own errors: all are OSErrors to us, and so listed with their reason."""
    try:
        yield
    except FileNotFoundError as error:
        reason = error.__cause__
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):  # the store is not reached
            raise reason from None  # it is the cause of `error`: it must not become its own
        if (status := getattr(reason, "status", _GONE[0])) not in _GONE:  # of HTTP
            raise OSError(errno.EIO, f"the server answers {status}") from error
        raise
    except (OSError, MatVitError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, one_line(str(error) or type(error).__name__)) from error


def remote_status(info: dict[str, Any]) -> Status:
    """What fsspec's `info` says of one file."""
    times = (info.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    time = next((time for time in times if time is not None), None)
    return Status(size=_size(info.get("size")), mtime_ns=_held(_nanoseconds(time)), regular=info.get("type") == "file")


def _held(mtime_ns: int) -> int:
    """The nearest time that SQLite's 64 bits hold: they end in the year 2262."""
    return min(max(mtime_ns, -(2**63)), 2**63 - 1)


def _nanoseconds(time: object) -> int:
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else time
        if isinstance(moment, datetime):
            return int(moment.timestamp() * 1e6) * 1000  # whole microseconds: float seconds hold no more
        return int(moment * 1e9) if isinstance(moment, int | float) else NO_TIME
    except (ValueError, OverflowError):  # no date, none that a number stands for, NaN
        return NO_TIME


def _size(value: object) -> int:
    """Bytes; 0 where a store does not tell."""
    is_size = isinstance(value, int | float) and 0 <= value < 2**63
    return int(value) if is_size else 0  # type: ignore[call-overload]


class _Remote(io.RawIOBase):
    """A store's file whose errors are OSErrors."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with remote_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with remote_errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Window(io.RawIOBase):
    def __init__(self, file: BinaryIO, *, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


Open = Callable[[], tuple[BinaryIO, Status]]


def window(file: BinaryIO, *, offset: int, size: int) -> BinaryIO:
    """`size` bytes of a file from `offset` on, as a file of their own; closing it closes the file."""
    return cast(BinaryIO, io.BufferedReader(_Window(file, offset=offset, size=size)))


def one_line(reason: str) -> str:
    """`reason` as what a line of text and SQLite can hold: decoders quote bytes of damaged files."""
    return " ".join(reason.encode("utf-8", "replace").decode("utf-8").replace("\0", "").split())[:300]


def os_reason(error: OSError | MatVitError) -> str:
    """A short reason for a person."""
    if isinstance(error, MatVitError):
        return f"{error.what}; {error.fix}"
    known = {FileNotFoundError: "no such file", PermissionError: "may not be read"}
    if isinstance(error, FileNotFoundError) and error.strerror in (NO_MEMBER, NO_ROW):
        return error.strerror
    return known.get(type(error)) or f"cannot be read ({error.strerror or str(error) or type(error).__name__})"
