"""From one file to pixels, in a thread: sniffed, read, hashed, and decoded only when its content is new."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from matvit.encoder import ImageEncoder
from matvit.errors import ImageError, NotDecodedError
from matvit.preprocess import MAX_FILE_BYTES, FloatArray, Header, read_header
from retrieval.items import OK
from retrieval.known import Known
from retrieval.locations import Open, Status, one_line, os_reason
from retrieval.types import SkippedFile

MEMORY_BYTES = 1536 * 2**20  # for all pictures that are read and decoded at once; one that needs more is alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One picture that must be read, because it is new or its size or time changed."""

    full_path: str  # its location, for messages
    root: str
    path: bytes
    known: Known | None  # what the index has under this very path
    open: Open  # its bytes, and the status of its file, or of the shard that it is in
    metadata: str | None = None  # a JSON object; None: what the index has


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A file's content: exactly one of `pixels`, `reason` and `same` is there."""

    task: Task
    size: int
    mtime_ns: int
    content_sha256: str
    width: int | None = None
    height: int | None = None
    pixels: FloatArray | None = None  # (1, 3, H, W)
    reason: str | None = None  # why it is no picture
    same: Known | None = None  # an item with this content


class MemoryBudget:
    """Memory that threads share: they wait until theirs is free. One that needs more than all of it has it alone."""

    def __init__(self, size: int) -> None:
        """`size`: bytes."""
        self._size = size
        self._used = 0
        self._free = threading.Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes while the block runs."""
        size = min(size, self._size)
        with self._free:
            self._free.wait_for(lambda: self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._free:
                self._used -= size
                self._free.notify_all()


class Loader:
    """Reads files for one encoder. Safe from any thread."""

    def __init__(self, encoder: ImageEncoder, held: Callable[[str], Known | None]) -> None:
        """`held`: the picture that the index has, by its content's sha256; such are not decoded again."""
        self._encoder = encoder
        self._held = held
        self._memory = MemoryBudget(MEMORY_BYTES)

    def load(self, task: Task) -> Loaded | SkippedFile:
        """Read and preprocess one file.

        A SkippedFile comes back when the file could not be read, or not be decoded for want of memory or a decoder:
        it says nothing about the content, so the index does not remember it and the next run tries again.
        """
        try:
            file, status = task.open()
            with file:
                with self._memory.reserve(min(_length(file), MAX_FILE_BYTES)):
                    reason, header = _sniff(file, task)
                memory = header.memory if header else 0
                with self._memory.reserve(_length(file) + memory if reason is None else 0):
                    return self._decode(*_read(task, file, status, reason, header))
        except OSError as error:
            reason = os_reason(error)
        except NotDecodedError as error:
            reason = one_line(error.what)
        except MemoryError:
            reason = "there was not enough memory to read it"
        return SkippedFile(path=Path(task.full_path), reason=reason)

    def _decode(self, loaded: Loaded, data: bytes) -> Loaded:
        known = loaded.task.known
        if known and known.item.status == OK and known.item.content_sha256 == loaded.content_sha256:
            return replace(loaded, reason=None, same=known)
        if loaded.reason is not None:
            return loaded
        if same := self._held(loaded.content_sha256):
            return replace(loaded, same=same)
        try:
            return replace(loaded, pixels=self._encoder.preprocess([data]))
        except NotDecodedError:
            raise
        except ImageError as error:
            return replace(loaded, width=None, height=None, reason=one_line(error.what))


def _length(file: BinaryIO) -> int:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    return length


def _sniff(file: BinaryIO, task: Task) -> tuple[str | None, Header | None]:
    """Why it is no picture, or its header. Raises NotDecodedError."""
    try:
        return None, read_header(file, path=task.full_path)
    except NotDecodedError:
        raise
    except ImageError as error:
        return (error.what if _length(file) else "the file is empty"), None


def _read(
    task: Task, file: BinaryIO, status: Status, reason: str | None, header: Header | None
) -> tuple[Loaded, bytes]:
    """The file and, if it begins like a picture, its bytes: others, such as films, may be large."""
    data = file.read() if reason is None else b""
    loaded = Loaded(
        task=task,
        size=status.size,
        mtime_ns=status.mtime_ns,
        content_sha256=hashlib.sha256(data).hexdigest() if data else _sha256(file),
        width=header.width if header else None,
        height=header.height if header else None,
        reason=reason,
    )
    return loaded, data


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**18):
        digest.update(piece)
    return digest.hexdigest()
