"""From files to pixels, in a thread: sniffed, read, hashed, and decoded only when their content is new."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from matvit.decoding import ANY_MEMORY, NOT_NOW, Decoded, Decoders, ReadFile
from matvit.encoder import ImageEncoder
from matvit.errors import ImageError, NotDecodedError
from matvit.preprocess import MAX_FILE_BYTES, FloatArray, Header, PixelArray, read_header
from retrieval.items import OK
from retrieval.known import Known
from retrieval.locations import Open, Status, one_line, os_reason
from retrieval.types import SkippedFile

MEMORY_BYTES = 1536 * 2**20  # for all pictures that are read and decoded at once; one that needs more is alone
SMALL_BYTES = 256 * 2**10  # files up to this are sent to decoders together, unlooked at, ...
SMALL_MEMORY = 32 * 2**20  # ... and decoded one after the other while they take no more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One picture that must be read, because it is new or its size or time changed."""

    full_path: str  # its location, for messages
    root: str
    path: bytes
    known: Known | None  # what the index has under this very path
    open: Open  # its bytes, and the status of its file, or of the shard that it is in
    is_file: bool = False  # whether that only opens `full_path`, a file of this host's
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
    pixels: FloatArray | PixelArray | None = None  # (1, 3, H, W); uint8 from decoders
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


@dataclass(frozen=True, slots=True)
class _Small:
    """A file that a decoder gets with others."""

    task: Task
    status: Status
    content_sha256: str
    data: bytes = b""  # b"": the decoder has read it itself

    @classmethod
    def read(cls, task: Task, file: ReadFile) -> _Small:
        """By a decoder."""
        return cls(task, Status(size=file.size, mtime_ns=file.mtime_ns), file.sha256)

    def loaded(self, found: Decoded) -> Loaded | SkippedFile:
        if isinstance(found.error, NotDecodedError):
            return SkippedFile(path=Path(self.task.full_path), reason=one_line(found.error.what))
        return Loaded(
            task=self.task,
            size=self.status.size,
            mtime_ns=self.status.mtime_ns,
            content_sha256=self.content_sha256,
            width=None if found.error else found.width,
            height=None if found.error else found.height,
            pixels=None if found.pixels is None else found.pixels[np.newaxis],
            reason=one_line(found.error.what) if found.error else None,
        )


class Loader:
    """Reads files for one encoder. Safe from any thread."""

    def __init__(
        self, encoder: ImageEncoder, held: Callable[[str], Known | None], decoders: Decoders | None = None
    ) -> None:
        """`held`: the picture that the index has, by its content's sha256; such are not decoded again.

        `decoders`: what turns files into pixels, and gives these as uint8; None: the encoder does.
        """
        self._encoder = encoder
        self._held = held
        self._decoders = decoders
        self._memory = MemoryBudget(MEMORY_BYTES)

    def load(self, task: Task) -> Loaded | SkippedFile:
        """Read and preprocess one file.

        A SkippedFile comes back when the file could not be read, or not be decoded for want of memory or a decoder:
        it says nothing about the content, so the index does not remember it and the next run tries again.
        """
        [found] = self._together([self._read(task)])
        return found

    def load_all(self, tasks: Sequence[Task]) -> list[Loaded | SkippedFile]:
        """`load` of each, in order; decoders get those that are small in one message, or read them themselves."""
        if self._decoders is None:
            return [self.load(task) for task in tasks]
        if not all(task.is_file for task in tasks):
            return self._together([self._read(task) for task in tasks])
        return self._read_by_decoder(tasks, self._decoders)

    def _read_by_decoder(self, tasks: Sequence[Task], decoders: Decoders) -> list[Loaded | SkippedFile]:
        """What is large, cannot be read, or has a content that is held, is read here."""

        def is_new(number: int, file: ReadFile) -> bool:
            return not self._is_own(tasks[number], file.sha256) and not self._held(file.sha256)

        names = [task.full_path for task in tasks]
        with self._memory.reserve(SMALL_MEMORY):
            try:
                found = decoders.read(names, largest=SMALL_BYTES, memory=SMALL_MEMORY, wanted=is_new)
            except MemoryError:  # here, for all the answers
                found = [None for _ in tasks]
        return [
            self._alone(task) if one is None else self._answered(_Small.read(task, one[0]), one[1])
            for task, one in zip(tasks, found, strict=True)
        ]

    def _together(self, found: Sequence[Loaded | SkippedFile | _Small]) -> list[Loaded | SkippedFile]:
        small = [one for one in found if isinstance(one, _Small)]
        if self._decoders is None or not small:
            return [one for one in found if not isinstance(one, _Small)]
        with self._memory.reserve(SMALL_MEMORY):
            pictures = [(one.data, one.task.full_path) for one in small]
            try:
                answers: Iterator[Decoded] = iter(self._decoders.decode(pictures, memory=SMALL_MEMORY))
            except MemoryError:  # here, for all the answers
                answers = repeat(NOT_NOW)
        return [self._answered(one, next(answers)) if isinstance(one, _Small) else one for one in found]

    def _answered(self, small: _Small, found: Decoded) -> Loaded | SkippedFile:
        takes_more = found.pixels is None and found.error is None  # memory than it might
        return self._alone(small.task) if takes_more else small.loaded(found)

    def _alone(self, task: Task) -> Loaded | SkippedFile:
        found = self._read(task, alone=True)
        assert not isinstance(found, _Small)
        return found

    def _read(self, task: Task, *, alone: bool = False) -> Loaded | SkippedFile | _Small:
        try:
            file, status = task.open()
            with file:
                length = _length(file)
                if self._decoders is not None and not alone and 0 < length <= SMALL_BYTES:
                    if small := self._small(task, file, status):
                        return small
                    file.seek(0)
                with self._memory.reserve(min(length, MAX_FILE_BYTES)):
                    reason, header = _sniff(file, task)
                memory = header.memory if header else 0
                copies = 1 if self._decoders is None else 2
                with self._memory.reserve(copies * _length(file) + memory if reason is None else 0):
                    return self._decode(*_read(task, file, status, reason, header))
        except OSError as error:
            reason = os_reason(error)
        except NotDecodedError as error:
            reason = one_line(error.what)
        except MemoryError:
            reason = "there was not enough memory to read it"
        return SkippedFile(path=Path(task.full_path), reason=reason)

    def _small(self, task: Task, file: BinaryIO, status: Status) -> _Small | None:
        """None when its content is held, or was its own already."""
        data = file.read()
        sha256 = hashlib.sha256(data).hexdigest()
        if self._is_own(task, sha256) or self._held(sha256):
            return None
        return _Small(task, status, sha256, data)

    def _decode(self, loaded: Loaded, data: bytes) -> Loaded:
        if self._is_own(loaded.task, loaded.content_sha256):
            return replace(loaded, reason=None, same=loaded.task.known)
        if loaded.reason is not None:
            return loaded
        if same := self._held(loaded.content_sha256):
            return replace(loaded, same=same)
        try:
            return replace(loaded, pixels=self._pixels(loaded.task, data))
        except NotDecodedError:
            raise
        except ImageError as error:
            return replace(loaded, width=None, height=None, reason=one_line(error.what))

    def _is_own(self, task: Task, content_sha256: str) -> bool:
        """Whether the index has a picture with this content at this very place."""
        known = task.known
        return known is not None and known.item.status == OK and known.item.content_sha256 == content_sha256

    def _pixels(self, task: Task, data: bytes) -> FloatArray | PixelArray:
        """(1, 3, H, W). Raises ImageError."""
        if self._decoders is None:
            return self._encoder.preprocess([data])
        [found] = self._decoders.decode([(data, task.full_path)], memory=ANY_MEMORY)
        if found.error is not None:
            raise found.error
        assert found.pixels is not None
        return found.pixels[np.newaxis]


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
