"""From files to a published index: plan, decode and encode, publish now and then."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent, in_short
from retrieval.errors import DiskRefusalError
from retrieval.found_files import FoundFiles
from retrieval.items import OK, SKIPPED, Item
from retrieval.known import Known, KnownItems
from retrieval.loading import Loaded, Task
from retrieval.locations import NO_TIME, is_url, location, split_member
from retrieval.pace import Pace
from retrieval.pipeline import NO_EMBEDDING, Embedded, embed_all
from retrieval.plan import Plan, Unchanged, Unread
from retrieval.presence import Presence
from retrieval.roots import Roots
from retrieval.snapshot import Snapshot
from retrieval.sources import is_below, is_gone, lstat_error
from retrieval.types import IngestReport, SkippedFile
from retrieval.writer import Entry, GenerationWriter

PUBLISH_ITEMS = 2048  # a kill loses at most so many pictures, or what `Pace` says
_PROGRESS_SECONDS = 0.1
_AWAY = "nothing of it is there; nothing was forgotten, since a disk may be away"


class Ingest:
    """One run over the files that were found. Use it once, while holding the writer's lock."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        writer: GenerationWriter,
        encoder: Callable[[], ImageEncoder],  # asked for when a picture must be read: loading one takes seconds
        found: FoundFiles,
        progress: Progress,
    ) -> None:
        self._snapshot = snapshot
        self._writer = writer
        self._encoder = encoder
        self._found = found
        self._progress = progress
        self._roots = Roots(snapshot.manifest.roots, found.bases)
        self._known = KnownItems(snapshot, found.places())
        self._total = found.total()
        self._next_id = snapshot.manifest.next_id
        self._generation = snapshot.manifest.generation
        self._gone: dict[str, list[Known]] = {}  # to be forgotten, unless found elsewhere
        self._away: dict[int, str] = {}  # not to be forgotten, by id: the place, or folder below it, that holds nothing
        self._deleted: dict[str, list[int]] = {}  # segment -> ids, not yet published
        self._pending: list[Entry] = []  # encoded, not yet published
        self._pace = Pace(most=PUBLISH_ITEMS)
        self._started = time.monotonic()
        self._done = self._reported = 0
        self._reported_at = 0.0
        self._indexed = 0
        self._unchanged = 0
        self._deleted_count = 0
        self._skipped = [*found.skipped, *found.missing]

    def run(self, *, delete: bool) -> IngestReport:
        """Bring the index up to date with the files. What is complete is published, whatever ends the run."""
        gone, homes = self._find_gone(delete=delete)
        if delete:
            self._gone = gone
            self._skipped = [file for file in self._skipped if location(file.path) not in homes]
        try:
            self._read_and_encode()
            kept = self._forget_gone()
            self._publish()
        except DiskRefusalError:  # it would refuse again
            raise
        except BaseException:
            self._writer.catch_up()
            self._publish()
            raise
        self._report(force=True)
        seconds = time.monotonic() - self._started
        return IngestReport(
            indexed=self._indexed,
            unchanged=self._unchanged,
            deleted=self._deleted_count,
            gone=kept if delete else sum(map(len, gone.values())),
            skipped=tuple(sorted(self._skipped, key=lambda file: file.path)),
            images_per_second=self._indexed / seconds if seconds > 0 else 0.0,
            seconds=seconds,
        )

    def _find_gone(self, *, delete: bool) -> tuple[dict[str, list[Known]], set[str]]:
        """Items below the named folders, or at named places, whose file is gone, by their content's sha256.

        And those of the named places, gone as well, that such items lay at or below. What may be on a disk that is
        not there now is told apart, in `_away`, where they are to be forgotten.
        """
        gone: dict[int, Known] = {}
        missing = {location(file.path) for file in self._found.missing}
        left: set[str] = set()
        is_there, emptied = Presence(self._found), cache(_emptied)
        for place in sorted(missing.union(self._found.scopes)):
            away: bool | None = None
            for known in self._known.at_or_below(place):
                path = self._snapshot.file_name(known.item.place)
                if known.item.id in gone or not is_there(path, known.item):
                    gone[known.item.id] = known
                    left.update(missing.intersection([place]))
                    if not delete:
                        continue
                    if away is None:
                        away = self._is_away(place, path, missing=place in missing)
                    container, member = split_member(path)
                    if away:
                        home: str | None = place
                    elif member is not None and is_there.holds_nothing(container):
                        home = container
                    else:
                        home = emptied(os.path.dirname(container), place)  # noqa: PTH120
                    if home is not None:
                        self._away.setdefault(known.item.id, home)
        by_content: dict[str, list[Known]] = {}
        for known in gone.values():
            by_content.setdefault(known.item.content_sha256, []).append(known)
        return by_content, left

    def _is_away(self, place: str, path: str, *, missing: bool) -> bool:
        """Whether nothing of a named place is there: of a folder, or of that around a picture. `path`: of an item."""
        if not missing:
            return not self._found.any_at_or_below(place)
        if is_url(place) or is_below(split_member(path)[0], [place]):
            return True
        return not _holds_something(os.path.dirname(place))  # noqa: PTH120 - as text, like all places

    def _forget_gone(self) -> int:
        """Forgets what was not found elsewhere, but for what is away; gives how many those are."""
        kept: list[str] = []
        for known in chain.from_iterable(self._gone.values()):
            if known.item.id in self._away:
                kept.append(self._away[known.item.id])
                continue
            self._deleted.setdefault(known.segment.entry.name, []).append(known.item.id)
            self._deleted_count += known.item.status == OK
        self._gone = {}
        self._skipped += (SkippedFile(path=Path(place), reason=_AWAY) for place in dict.fromkeys(kept))
        return len(kept)

    def _read_and_encode(self) -> None:
        tasks = self._tasks()
        first = next(tasks, None)
        if first is None:
            return
        results = embed_all(chain([first], tasks), encoder=self._encoder(), held=self._known.with_content)
        with closing(results):
            for embedded in results:
                self._take(embedded)
                self._publish_when_due()

    def _tasks(self) -> Iterator[Task]:
        """The pictures that must be read; the others are counted here."""
        for step in Plan(self._found, known=self._known, roots=self._roots):
            if isinstance(step, Task):
                self._report(force=self._done != self._reported)  # reading it may take long
                yield step
            elif isinstance(step, Unread):
                self._keep_unread(step.full_path, step.reason)
            elif isinstance(step, SkippedFile):
                self._skip(step)
            else:
                self._keep_known(step)

    def _keep_known(self, step: Unchanged) -> None:
        """A file that did not change; what a list says of it may have."""
        known = step.known
        if step.metadata is not None and step.metadata != known.item.metadata:
            item = replace(known.item, metadata=step.metadata, row=None)
            self._pending.append(Entry(item=item, embedding=_embedding(known), replaces=known.segment.entry.name))
            self._publish_when_due()
        self._count_known(step.full_path, known.item)

    def _take(self, embedded: Embedded) -> None:
        loaded = embedded.loaded
        if isinstance(loaded, SkippedFile):
            place = location(loaded.path)
            if is_gone(lstat_error(split_member(place)[0])):  # it has just gone, or a store does not give it
                self._skip(loaded)
            else:
                self._keep_unread(place, loaded.reason)
        elif loaded.same is not None:
            self._keep(loaded, loaded.same)
        elif loaded.reason is not None:
            self._pending.append(_entry(loaded, self._item(loaded), None))
            self._skip_file(loaded.task.full_path, loaded.reason)
        elif embedded.embedding is None:
            self._keep_unread(loaded.task.full_path, NO_EMBEDDING)
        else:
            self._pending.append(_entry(loaded, self._item(loaded), embedded.embedding))
            self._indexed += 1
            self._count_done()

    def _keep_unread(self, full_path: str, reason: str) -> None:
        """A picture that says nothing about its content: what the index has of it stays, if it is a picture there."""
        root, path = self._roots.locate(full_path)
        known = self._known.at(root, path)
        if known is None or (known.item.status == SKIPPED and known.item.reason != reason):
            item = Item(
                id=self._id_of(known),
                root=root,
                path=path,
                content_sha256="",
                size=0,
                mtime_ns=NO_TIME,  # so it is never taken for unchanged
                width=None,
                height=None,
                metadata=known.item.metadata if known else "{}",
                status=SKIPPED,
                reason=reason,
                row=None,
            )
            self._pending.append(Entry(item=item, embedding=None, replaces=known.segment.entry.name if known else None))
            self._publish_when_due()
        self._skip_file(full_path, reason)

    def _publish_when_due(self) -> None:
        if self._pace.is_due(len(self._pending)):
            self._publish()

    def _keep(self, loaded: Loaded, same: Known) -> None:
        """Take the embedding of the same content: of this file before its time changed, or of another file."""
        task = loaded.task
        moved = self._gone.get(loaded.content_sha256)
        if task.known is None and moved and moved[-1].item.status == OK:  # its old place is forgotten, but not its id
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
        return Item(
            id=self._id_of(known),
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

    def _id_of(self, known: Known | None) -> int:
        number = known.item.id if known else self._next_id
        self._next_id = max(self._next_id, number + 1)
        return number

    def _publish(self) -> None:
        # The generations differ when an interrupt fell between CURRENT's replacement and forgetting these entries.
        unpublished = self._writer.manifest.generation == self._generation
        if unpublished and (self._pending or self._deleted):
            self._writer.publish(self._pending, deleted=self._deleted, roots=self._roots.named, next_id=self._next_id)
        self._pending, self._deleted = [], {}
        self._generation = self._writer.manifest.generation
        self._pace.published()

    def _count_known(self, full_path: str, item: Item) -> None:
        if item.status == SKIPPED:
            self._skip_file(full_path, item.reason or "")
        else:
            self._unchanged += 1
            self._count_done()

    def _skip_file(self, full_path: str, reason: str) -> None:
        self._skip(SkippedFile(path=Path(full_path), reason=reason))

    def _skip(self, file: SkippedFile) -> None:
        self._skipped.append(file)
        self._count_done()

    def _count_done(self) -> None:
        self._done += 1
        self._report()

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._reported_at < _PROGRESS_SECONDS:
            return
        self._reported_at, self._reported = now, self._done
        rate = f"{in_short(self._indexed / max(now - self._started, 1e-9))}/s, " if self._indexed else ""
        self._progress(
            ProgressEvent(
                stage="index",
                done=self._done,
                total=self._total,
                unit="pictures",
                note=f"{rate}{len(self._skipped)} skipped",
            )
        )


def _emptied(folder: str, place: str) -> str | None:
    """The first folder from `folder` up that is there, if it lies below `place` and holds nothing.

    So does the mount point of a disk that is away, and a link that leads to one.
    """
    while is_below(folder, [place]):
        if os.path.lexists(folder):
            return None if _holds_something(folder) else folder
        folder = os.path.dirname(folder)  # noqa: PTH120 - as text, like all places
    return None


def _holds_something(folder: str) -> bool:
    try:
        with os.scandir(folder) as inside:
            return any(True for _ in inside)
    except NotADirectoryError:  # a file has taken its place
        return True
    except OSError:
        return False


def _entry(loaded: Loaded, item: Item, embedding: FloatArray | None) -> Entry:
    known = loaded.task.known
    return Entry(item=item, embedding=embedding, replaces=known.segment.entry.name if known else None)


def _embedding(known: Known) -> FloatArray | None:
    """(D,) float32, copied; None for a skipped file."""
    return None if known.item.row is None else np.array(known.segment.embeddings()[known.item.row])
