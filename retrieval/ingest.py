"""From files to a published index: plan, decode in threads, encode in batches, publish now and then."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from retrieval.encoders import check_shape, is_unit, normalised
from retrieval.errors import IngestError
from retrieval.items import OK, SKIPPED, Item
from retrieval.known import Known, KnownItems
from retrieval.loading import Loaded, Loader, Task
from retrieval.locations import NO_TIME, Status, is_url, location, open_file, os_reason, split_member, status_of
from retrieval.shards import Member, ShardError, Table, is_table, tar_members
from retrieval.snapshot import Snapshot
from retrieval.sources import TABLE, TAR, Found, FoundFile, Roots, is_below, is_gone, lstat_error
from retrieval.types import IngestReport, SkippedFile
from retrieval.writer import Entry, GenerationWriter

BATCH = 32  # pictures encoded together
AHEAD = 2 * BATCH  # pictures decoded and waiting, at most: bounds the memory
PUBLISH_ITEMS = 2048  # a kill loses at most so many pictures ...
PUBLISH_SECONDS = 60.0  # ... or so much time
MAX_FILE_BYTES = 512 * 2**20  # larger files are no photographs; reading one whole could exhaust the memory
_TOO_LARGE = f"has more than {MAX_FILE_BYTES // 2**20} MiB"
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
        self._known = KnownItems(snapshot)
        self._total = found.total()
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
            self._skipped = [file for file in self._skipped if location(file.path) not in homes]
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
        missing = [location(file.path) for file in self._found.missing]
        left: set[str] = set()
        is_there = _Presence(self._found)
        for known in self._known.all():
            path = self._snapshot.file_name(known.item.place)
            homes = [place for place in missing if path == place or is_below(path, [place])]
            if (homes or is_below(path, self._found.scopes)) and not is_there(path, known.item):
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
        loader = Loader(self._encoder, self._known.with_content)
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
        """The pictures that must be read; the others are counted here."""
        for file in self._found.files():
            try:
                status = file.status or status_of(file.path)
            except OSError as error:
                self._skip(file.path, os_reason(error))
                continue
            if not status.regular:
                self._skip(file.path, "not a regular file")
            elif file.kind in {TAR, TABLE}:
                yield from self._members(file.path, status, kind=file.kind)
            else:
                yield from self._file(file, status)

    def _file(self, file: FoundFile, status: Status) -> Iterator[Task]:
        root, path = self._roots.locate(file.path)
        known = self._known.at(root, path)
        if file.problem is not None:
            self._skip(file.path, file.problem)
        elif status.size > MAX_FILE_BYTES:
            self._skip(file.path, _TOO_LARGE)
        elif known and _is_unchanged(known.item, status):
            self._keep_known(file.path, known, file.metadata)
        else:
            yield Task(
                full_path=file.path,
                root=root,
                path=path,
                known=known,
                open=partial(open_file, file.path),
                status=status if is_url(file.path) else None,
                metadata=file.metadata,
            )

    def _members(self, container: str, status: Status, *, kind: str) -> Iterator[Task]:
        """The pictures of a shard or table; where it is damaged, those before that."""
        try:
            for member in tar_members(container) if kind == TAR else self._rows(container, status):
                yield from self._member(container, member, status)
        except ShardError as error:
            self._skip(container, error.reason)
        except OSError as error:
            self._skip(container, os_reason(error))

    def _rows(self, container: str, status: Status) -> Iterator[Member]:
        """The rows of those row groups that hold something new; the others are counted here."""
        table = Table(container)
        try:
            for number, rows in enumerate(table.groups()):
                known = [self._known.at(*self._roots.locate(f"{container}#{row}")) for row in rows]
                same = [one for one in known if one and _is_unchanged(one.item, status)]
                if len(same) < len(rows):
                    yield from table.members(number, rows.start)
                    continue
                for one in same:
                    self._count_known(self._snapshot.file_name(one.item.place), one.item)
        finally:
            table.close()

    def _member(self, container: str, member: Member, status: Status) -> Iterator[Task]:
        full_path = f"{container}#{member.name}"
        if member.problem is not None:
            self._skip(full_path, member.problem)
            return
        root, path = self._roots.locate(full_path)
        known = self._known.at(root, path)
        if member.size > MAX_FILE_BYTES:
            self._skip(full_path, _TOO_LARGE)
        elif known and _is_unchanged(known.item, status):
            self._keep_known(full_path, known, member.metadata)
        else:
            yield Task(
                full_path=full_path,
                root=root,
                path=path,
                known=known,
                open=partial(member.open, container),
                status=status,
                metadata=member.metadata,
            )

    def _keep_known(self, full_path: str, known: Known, metadata: str | None) -> None:
        """A file that did not change; what a list says of it may have."""
        if metadata is not None and metadata != known.item.metadata:
            item = replace(known.item, metadata=metadata, row=None)
            self._pending.append(Entry(item=item, embedding=_embedding(known), replaces=known.segment.entry.name))
            self._publish_when_due()
        self._count_known(full_path, known.item)

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
        self._publish_when_due()

    def _publish_when_due(self) -> None:
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
            metadata=loaded.task.metadata or (known.item.metadata if known else "{}"),
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
                total=self._total,
                unit="pictures",
                note=f"{rate}{len(self._skipped)} skipped",
            )
        )


class _Presence:
    """Whether the picture of an item is still there: asks the disk, not what was found by its name."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._members: tuple[str, frozenset[str] | int] = "", 0  # of the shard that was asked for last

    def __call__(self, path: str, item: Item) -> bool:
        container, member = split_member(path)
        if is_url(container):
            return self._found.holds(container) and (member is None or self._holds(container, member, item))
        error = lstat_error(container)
        if error is not None or member is None:
            return not is_gone(error)
        return self._holds(container, member, item)

    def _holds(self, container: str, member: str, item: Item) -> bool:
        try:
            if _is_unchanged(item, status_of(container)):
                return True
            if self._members[0] != container:
                self._members = container, _names(container)
        except OSError:  # says nothing about what was in it
            return True
        names = self._members[1]
        return int(member) < names if isinstance(names, int) else member in names


def _names(container: str) -> frozenset[str] | int:
    """The members of a tar shard, or the number of rows of a table. Raises OSError."""
    if not is_table(container):
        return frozenset(member.name for member in tar_members(container))
    table = Table(container)
    try:
        return len(table)
    finally:
        table.close()


def _is_unchanged(item: Item, status: Status) -> bool:
    return status.mtime_ns != NO_TIME and (item.size, item.mtime_ns) == (status.size, status.mtime_ns)


def _entry(loaded: Loaded, item: Item, embedding: FloatArray | None) -> Entry:
    known = loaded.task.known
    return Entry(item=item, embedding=embedding, replaces=known.segment.entry.name if known else None)


def _embedding(known: Known) -> FloatArray | None:
    """(D,) float32, copied; None for a skipped file."""
    return None if known.item.row is None else np.array(known.segment.embeddings()[known.item.row])
