"""From files to a published index: plan, decode in threads, encode in batches, publish now and then."""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from retrieval.encoders import check_shape, is_unit, normalised
from retrieval.errors import IngestError
from retrieval.items import OK, SKIPPED, Item
from retrieval.loading import Known, Loaded, Loader, Task, os_reason
from retrieval.snapshot import Snapshot
from retrieval.sources import Found, Roots, is_below, is_gone, lstat_error
from retrieval.types import IngestReport, SkippedFile
from retrieval.writer import Entry, GenerationWriter

BATCH = 32  # pictures encoded together
AHEAD = 2 * BATCH  # pictures decoded and waiting, at most: bounds the memory
PUBLISH_ITEMS = 2048  # a kill loses at most so many pictures ...
PUBLISH_SECONDS = 60.0  # ... or so much time
MAX_FILE_BYTES = 512 * 2**20  # larger files are no photographs; reading one whole could exhaust the memory
_PROGRESS_SECONDS = 0.1


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
        self._gone: dict[str, list[Known]] = {}  # to be forgotten, unless found elsewhere
        self._deleted: dict[str, list[int]] = {}  # segment -> ids, not yet published
        self._batch: list[tuple[Loaded, Item]] = []  # decoded, not yet encoded
        self._pending: list[Entry] = []  # encoded, not yet published
        self._started = self._published_at = time.monotonic()
        self._reported_at = 0.0
        self._done = 0
        self._indexed = 0
        self._unchanged = 0
        self._deleted_count = 0
        self._skipped = [*found.skipped, *found.missing]

    def run(self, *, delete: bool) -> IngestReport:
        """Bring the index up to date with the files. What is complete is published, whatever ends the run."""
        gone, homes = self._find_gone()
        if delete:
            self._gone = gone
            self._skipped = [file for file in self._skipped if os.fspath(file.path) not in homes]
        try:
            self._read_and_encode()
            self._forget_gone()
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
            gone=0 if delete else sum(map(len, gone.values())),
            skipped=tuple(sorted(self._skipped, key=lambda file: file.path)),
            images_per_second=self._indexed / seconds if seconds > 0 else 0.0,
            seconds=seconds,
        )

    def _find_gone(self) -> tuple[dict[str, list[Known]], set[str]]:
        """Items below the named folders, or at named places, whose file is gone, by their content's sha256.

        And those of the named places, gone as well, that such items lay at or below.
        """
        gone: dict[str, list[Known]] = {}
        missing = [os.fspath(file.path) for file in self._found.missing]
        left: set[str] = set()
        for known in self._known.values():
            path = self._snapshot.file_name(known.item.place)
            if path in self._found.files:
                continue
            homes = [place for place in missing if path == place or is_below(path, [place])]
            if (homes or is_below(path, self._found.scopes)) and is_gone(lstat_error(path)):
                gone.setdefault(known.item.content_sha256, []).append(known)
                left.update(homes)
        return gone, left

    def _forget_gone(self) -> None:
        for known in chain.from_iterable(self._gone.values()):  # those that were not found elsewhere
            self._deleted.setdefault(known.segment.entry.name, []).append(known.item.id)
            self._deleted_count += 1
        self._gone = {}

    def _read_and_encode(self) -> None:
        waiting: deque[Future[Loaded | SkippedFile]] = deque()
        held = {known.item.content_sha256: known for known in self._known.values() if known.item.status == OK}
        loader = Loader(self._encoder, held)
        pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        try:
            for task in self._tasks():
                waiting.append(pool.submit(loader.load, task))
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
                yield Task(full_path=full_path, size=status.st_size, root=root, path=path, known=known)

    def _take(self, loaded: Loaded | SkippedFile) -> None:
        if isinstance(loaded, SkippedFile):
            self._skip(os.fspath(loaded.path), loaded.reason)
            return
        if loaded.same is not None:
            self._keep(loaded, loaded.same)
        elif loaded.pixels is not None:
            item = self._item(loaded)
            self._batch.append((loaded, item))
            if len(self._batch) == BATCH:
                self._encode()
        else:
            self._pending.append(_entry(loaded, self._item(loaded), None))
            self._skip(loaded.task.full_path, loaded.reason or "")
        due = time.monotonic() - self._published_at > PUBLISH_SECONDS
        if len(self._pending) >= PUBLISH_ITEMS or due:
            self._publish()

    def _keep(self, loaded: Loaded, same: Known) -> None:
        """Take the embedding of the same content: of this file before its time changed, or of another file."""
        task = loaded.task
        moved = self._gone.get(loaded.content_sha256)
        if task.known is None and moved:  # its old place is forgotten, but not its id
            same = moved.pop()
            task = replace(task, known=same)
        item = replace(self._item(replace(loaded, task=task)), status=same.item.status, reason=same.item.reason)
        self._pending.append(_entry(replace(loaded, task=task), item, _embedding(same)))
        if task.known is same:
            self._count_known(task.full_path, item)
        else:
            self._indexed += 1
            self._count_done()

    def _item(self, loaded: Loaded) -> Item:
        known = loaded.task.known
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
            _entry(loaded, item, normalised(embedding))
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
        rate = f"{self._indexed / max(now - self._started, 1e-9):.0f}/s, " if self._indexed else ""
        self._progress(
            ProgressEvent(
                stage="index",
                done=self._done,
                total=len(self._found.files),
                unit="pictures",
                note=f"{rate}{len(self._skipped)} skipped",
            )
        )


def _entry(loaded: Loaded, item: Item, embedding: FloatArray | None) -> Entry:
    known = loaded.task.known
    return Entry(item=item, embedding=embedding, replaces=known.segment.entry.name if known else None)


def _embedding(known: Known) -> FloatArray | None:
    """(D,) float32, copied; None for a skipped file."""
    return None if known.item.row is None else np.array(known.segment.embeddings()[known.item.row])
