"""From files to a published index: plan, decode in threads, encode in batches, publish now and then."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from matvit.encoder import ImageEncoder
from matvit.errors import ImageError
from matvit.preprocess import FORMATS, FloatArray
from matvit.progress import Progress, ProgressEvent
from retrieval.encoders import check_shape, is_unit
from retrieval.errors import IngestError
from retrieval.items import OK, SKIPPED, Item
from retrieval.snapshot import OpenSegment, Snapshot
from retrieval.sources import Found, Roots, is_below
from retrieval.types import IngestReport, SkippedFile
from retrieval.writer import Entry, GenerationWriter

BATCH = 32  # pictures encoded together
AHEAD = 2 * BATCH  # pictures decoded and waiting, at most: bounds the memory
PUBLISH_ITEMS = 2048  # a kill loses at most so many pictures ...
PUBLISH_SECONDS = 60.0  # ... or so much time
MAX_FILE_BYTES = 512 * 2**20  # larger files are no photographs; reading one whole could exhaust the memory
_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An item that the index already has, and where."""

    item: Item
    segment: OpenSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One file that must be read, because it is new or its size or time changed."""

    full_path: str
    root: str
    path: bytes
    known: Known | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A file's content. `pixels` None: either no picture (`reason`), or the content that is `known` already."""

    task: Task
    size: int
    mtime_ns: int
    content_sha256: str
    width: int | None = None
    height: int | None = None
    pixels: FloatArray | None = None  # (1, 3, H, W)
    reason: str | None = None


class Ingest:
    """One run over the files that were found. Use it once, while holding the writer's lock."""

    def __init__(
        self, snapshot: Snapshot, *, writer: GenerationWriter, encoder: ImageEncoder, found: Found, progress: Progress
    ) -> None:
        self._snapshot = snapshot
        self._writer = writer
        self._encoder = encoder
        self._found = found
        self._progress = progress
        self._roots = Roots(snapshot.manifest.roots, found.bases)
        self._known = {
            (item.root, item.path): Known(item=item, segment=segment) for segment, item in snapshot.live_items()
        }
        self._next_id = snapshot.manifest.next_id
        self._generation = snapshot.manifest.generation
        self._deleted: dict[str, list[int]] = {}  # segment -> ids, not yet published
        self._batch: list[tuple[Loaded, Item]] = []  # decoded, not yet encoded
        self._pending: list[Entry] = []  # encoded, not yet published
        self._started = self._published_at = time.monotonic()
        self._reported_at = 0.0
        self._done = 0
        self._indexed = 0
        self._unchanged = 0
        self._deleted_count = 0
        self._skipped = list(found.skipped)

    def run(self, *, delete: bool) -> IngestReport:
        """Bring the index up to date with the files. What is complete is published, whatever ends the run."""
        if delete:
            self._forget_gone()
        try:
            self._read_and_encode()
        except IngestError:  # the disk refuses: it would refuse again
            raise
        except BaseException:
            self._writer.catch_up()
            self._publish()
            raise
        self._publish()
        self._report(force=True)
        seconds = time.monotonic() - self._started
        return IngestReport(
            indexed=self._indexed,
            unchanged=self._unchanged,
            deleted=self._deleted_count,
            skipped=tuple(sorted(self._skipped, key=lambda file: file.path)),
            images_per_second=self._indexed / seconds if seconds > 0 else 0.0,
            seconds=seconds,
        )

    def _forget_gone(self) -> None:
        for known in self._known.values():
            path = os.fspath(self._snapshot.full_path(known.item.place))
            if is_below(path, self._found.scopes) and not os.path.lexists(path):
                self._deleted.setdefault(known.segment.entry.name, []).append(known.item.id)
                self._deleted_count += 1

    def _read_and_encode(self) -> None:
        waiting: deque[Future[Loaded | SkippedFile]] = deque()
        pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        try:
            for task in self._tasks():
                waiting.append(pool.submit(load, task, encoder=self._encoder))
                if len(waiting) >= AHEAD:
                    self._take(waiting.popleft().result())
            while waiting:
                self._take(waiting.popleft().result())
            self._encode()
        finally:
            pool.shutdown(cancel_futures=True)

    def _tasks(self) -> Iterator[Task]:
        """The files that must be read; the others are counted here."""
        for full_path in self._found.files:
            root, path = self._roots.locate(full_path)
            known = self._known.get((root, path))
            try:
                status = os.stat(full_path)  # noqa: PTH116 - a Path per file would double the time of a rerun
            except OSError as error:
                self._skip(full_path, os_reason(error))
                continue
            if not stat.S_ISREG(status.st_mode):
                self._skip(full_path, "not a regular file")
            elif status.st_size > MAX_FILE_BYTES:
                self._skip(full_path, f"has more than {MAX_FILE_BYTES // 2**20} MiB")
            elif known and (known.item.size, known.item.mtime_ns) == (status.st_size, status.st_mtime_ns):
                self._count_known(full_path, known.item)
            else:
                yield Task(full_path=full_path, root=root, path=path, known=known)

    def _take(self, loaded: Loaded | SkippedFile) -> None:
        if isinstance(loaded, SkippedFile):
            self._skip(os.fspath(loaded.path), loaded.reason)
            return
        item = self._item(loaded)
        if loaded.pixels is not None:
            self._batch.append((loaded, item))
            if len(self._batch) == BATCH:
                self._encode()
        elif loaded.reason is not None:
            self._pending.append(_entry(loaded, item, None))
            self._skip(loaded.task.full_path, loaded.reason)
        else:
            self._pending.append(_with_new_time(loaded))
            self._count_known(loaded.task.full_path, item)
        due = time.monotonic() - self._published_at > PUBLISH_SECONDS
        if len(self._pending) >= PUBLISH_ITEMS or due:
            self._publish()

    def _item(self, loaded: Loaded) -> Item:
        known = loaded.task.known
        if known is not None and loaded.pixels is None and loaded.reason is None:
            return known.item
        number = known.item.id if known else self._next_id
        self._next_id = max(self._next_id, number + 1)
        return Item(
            id=number,
            root=loaded.task.root,
            path=loaded.task.path,
            content_sha256=loaded.content_sha256,
            size=loaded.size,
            mtime_ns=loaded.mtime_ns,
            width=loaded.width,
            height=loaded.height,
            status=SKIPPED if loaded.reason else OK,
            reason=loaded.reason,
            row=None,
        )

    def _encode(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        pixels = np.concatenate([loaded.pixels for loaded, _ in batch if loaded.pixels is not None])
        embeddings = self._encoder.encode(pixels)
        check_shape(embeddings, rows=len(batch), dim=self._writer.manifest.encoder.embedding_dim)
        good = is_unit(embeddings)
        self._pending += [
            _entry(loaded, item, embedding)
            for (loaded, item), embedding, fine in zip(batch, embeddings, good, strict=True)
            if fine
        ]
        for (loaded, _), fine in zip(batch, good, strict=True):
            if fine:
                self._indexed += 1
                self._count_done()
            else:
                self._skip(loaded.task.full_path, "the encoder gave no finite unit-length embedding")

    def _publish(self) -> None:
        # The generations differ when an interrupt fell between CURRENT's replacement and forgetting these entries.
        unpublished = self._writer.manifest.generation == self._generation
        if unpublished and (self._pending or self._deleted):
            self._writer.publish(self._pending, deleted=self._deleted, roots=self._roots.named, next_id=self._next_id)
        self._pending, self._deleted = [], {}
        self._generation = self._writer.manifest.generation
        self._published_at = time.monotonic()

    def _count_known(self, full_path: str, item: Item) -> None:
        if item.status == SKIPPED:
            self._skip(full_path, item.reason or "")
        else:
            self._unchanged += 1
            self._count_done()

    def _skip(self, full_path: str, reason: str) -> None:
        self._skipped.append(SkippedFile(path=Path(full_path), reason=reason))
        self._count_done()

    def _count_done(self) -> None:
        self._done += 1
        self._report()

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._reported_at < _PROGRESS_SECONDS:
            return
        self._reported_at = now
        rate = self._indexed / max(now - self._started, 1e-9)
        self._progress(
            ProgressEvent(
                stage="index",
                done=self._done,
                total=len(self._found.files),
                unit="pictures",
                note=f"{rate:.0f}/s, {len(self._skipped)} skipped",
            )
        )


def load(task: Task, *, encoder: ImageEncoder) -> Loaded | SkippedFile:
    """Read and preprocess one file; runs in a thread.

    A SkippedFile comes back when the file could not be read: it says nothing about the content, so the
    index does not remember it and the next run tries again.
    """
    try:
        with Path(task.full_path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        return SkippedFile(path=Path(task.full_path), reason=os_reason(error))
    loaded = Loaded(
        task=task,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        content_sha256=hashlib.sha256(data).hexdigest(),
    )
    if task.known is not None and task.known.item.content_sha256 == loaded.content_sha256:
        return loaded
    try:
        pixels = encoder.preprocess([data])
    except ImageError as error:
        return replace(loaded, reason=_one_line(error.what) if data else "the file is empty")
    width, height = _stored_size(data)
    return replace(loaded, pixels=pixels, width=width, height=height)


def os_reason(error: OSError) -> str:
    """A short reason for a person."""
    known: Mapping[type[OSError], str] = {FileNotFoundError: "no such file", PermissionError: "may not be read"}
    return known.get(type(error)) or f"cannot be read ({error.strerror or type(error).__name__})"


def _stored_size(data: bytes) -> tuple[int | None, int | None]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            return image.size
    except Exception:  # the size is told to people, nothing depends on it
        return None, None


def _one_line(reason: str) -> str:
    # Decoders quote bytes of damaged files: keep what a line of text and SQLite can hold.
    return " ".join(reason.encode("utf-8", "replace").decode("utf-8").replace("\0", "").split())[:300]


def _entry(loaded: Loaded, item: Item, embedding: FloatArray | None) -> Entry:
    known = loaded.task.known
    return Entry(item=item, embedding=embedding, replaces=known.segment.entry.name if known else None)


def _with_new_time(loaded: Loaded) -> Entry:
    """The known item under its new size and time, with the embedding that it has: the next run need not read it."""
    known = loaded.task.known
    assert known is not None
    row = known.item.row
    embedding = None if row is None else np.array(known.segment.embeddings()[row])
    item = replace(known.item, size=loaded.size, mtime_ns=loaded.mtime_ns, row=None)
    return _entry(loaded, item, embedding)
