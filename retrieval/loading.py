"""From one file to pixels, in a thread: sniffed, read, hashed, and decoded only when its content is new."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

from matvit.encoder import ImageEncoder
from matvit.errors import ImageError
from matvit.preprocess import FloatArray, header_size
from retrieval.items import Item
from retrieval.snapshot import OpenSegment
from retrieval.types import SkippedFile

LARGE_BYTES = 64 * 2**20  # one file above it at a time: they are read whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An item that the index already has, and where."""

    item: Item
    segment: OpenSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One file that must be read, because it is new or its size or time changed."""

    full_path: str
    size: int  # bytes
    root: str
    path: bytes
    known: Known | None  # what the index has under this very path


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


class Loader:
    """Reads files for one encoder. Safe from any thread."""

    def __init__(self, encoder: ImageEncoder, held: Mapping[str, Known]) -> None:
        """`held`: pictures that the index has, by their content's sha256; they are not decoded again."""
        self._encoder = encoder
        self._held = held
        self._large = threading.Lock()

    def load(self, task: Task) -> Loaded | SkippedFile:
        """Read and preprocess one file.

        A SkippedFile comes back when the file could not be read: it says nothing about the content, so the
        index does not remember it and the next run tries again.
        """
        with self._large if task.size > LARGE_BYTES else nullcontext():
            try:
                with Path(task.full_path).open("rb") as file:
                    loaded, data = _read(task, file)
            except OSError as error:
                return SkippedFile(path=Path(task.full_path), reason=os_reason(error))
            return self._decode(loaded, data)

    def _decode(self, loaded: Loaded, data: bytes) -> Loaded:
        known = loaded.task.known
        if known is not None and known.item.content_sha256 == loaded.content_sha256:
            return replace(loaded, reason=None, same=known)
        if loaded.reason is not None:
            return loaded
        if same := self._held.get(loaded.content_sha256):
            return replace(loaded, same=same)
        try:
            return replace(loaded, pixels=self._encoder.preprocess([data]))
        except ImageError as error:
            return replace(loaded, width=None, height=None, reason=_one_line(error.what))


def _read(task: Task, file: BufferedReader) -> tuple[Loaded, bytes]:
    """The file and, if it begins like a picture, its bytes: others, such as films, may be large."""
    status = os.fstat(file.fileno())
    reason, data, size = None, b"", None
    try:
        size = header_size(file, path=task.full_path)
    except ImageError as error:
        reason = error.what if status.st_size else "the file is empty"
    if reason is None:
        data = file.read()
    loaded = Loaded(
        task=task,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        content_sha256=hashlib.sha256(data).hexdigest() if data else hashlib.file_digest(file, "sha256").hexdigest(),
        width=size[0] if size else None,
        height=size[1] if size else None,
        reason=reason,
    )
    return loaded, data


def os_reason(error: OSError) -> str:
    """A short reason for a person."""
    known: Mapping[type[OSError], str] = {FileNotFoundError: "no such file", PermissionError: "may not be read"}
    return known.get(type(error)) or f"cannot be read ({error.strerror or type(error).__name__})"


def _one_line(reason: str) -> str:
    # Decoders quote bytes of damaged files: keep what a line of text and SQLite can hold.
    return " ".join(reason.encode("utf-8", "replace").decode("utf-8").replace("\0", "").split())[:300]
