"""Moving an index into another encoder's space: embedded aside while the old one serves, then adopted in one step."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

from matvit.durable import sync_folder, temporary_name
from matvit.encoder import ElasticEncoder
from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from retrieval.encoders import describe
from retrieval.errors import DamagedFileError, IndexFormatError, IngestError
from retrieval.files import reading, writing
from retrieval.items import OK, SKIPPED, Item
from retrieval.locations import NO_TIME
from retrieval.manifest import (
    CURRENT,
    SEGMENTS,
    STAGING,
    EncoderEntry,
    Manifest,
    make_folders,
    publish_manifest,
    read_manifest,
    read_pointer,
)
from retrieval.pace import Pace
from retrieval.reembed import EmbeddedAgain, embed_again
from retrieval.snapshot import Snapshot, open_segment
from retrieval.types import SkippedFile, UpgradeReport
from retrieval.writer import Entry, GenerationWriter

PUBLISH_ITEMS = 512  # a kill loses at most so many pictures, or what `Pace` says

_AT_ONCE = 1024  # items that are looked up together


class Staged:
    """What is staged already, looked up by id: the items stay in their files, since there may be a million."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.segments = snapshot.segments
        ids, homes = live_ids(snapshot)
        order = np.argsort(ids)
        self._ids, self._homes = ids[order], homes[order]

    def homes_of(self, ids: IntArray) -> IntArray:
        """Which of the segments holds each; -1: none."""
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[places] == ids, self._homes[places], -1) if len(self._ids) else np.full_like(ids, -1)

    def holds(self, items: Sequence[Item]) -> set[int]:
        """The ids of those of `items` that are staged as they are."""
        by_id = {item.id: _untimed(item) for item in items}
        ids = np.fromiter(by_id, dtype=np.int64)
        homes = self.homes_of(ids)
        found = (
            item
            for home in np.unique(homes[homes >= 0])
            for item in self.segments[home].items.with_ids(ids[homes == home].tolist())
        )
        return {item.id for item in found if _untimed(item) == by_id[item.id]}


def _untimed(item: Item) -> Item:
    """A picture is staged with its file's size and time of then; by its content it is the same."""
    return replace(item, row=None) if item.status != OK else replace(item, row=None, size=0, mtime_ns=NO_TIME)


class Upgrade:
    """One run. Use it once, while holding the writer's lock."""

    def __init__(
        self, snapshot: Snapshot, *, writer: GenerationWriter, encoder: ElasticEncoder, progress: Progress
    ) -> None:
        """Raises IngestError when the index is in the encoder's space already."""
        self._snapshot = snapshot
        self._writer = writer
        self._encoder = encoder
        self._progress = progress
        self._folder = snapshot.folder / STAGING
        self._entry = describe(encoder)
        if self._entry.space_id == snapshot.manifest.encoder.space_id:
            raise IngestError(
                what="is in this encoder's embedding space already",
                where=str(snapshot.folder),
                fix="give another encoder, or leave it as it is",
            )
        self._pace = Pace(most=PUBLISH_ITEMS)
        self._pending: list[Entry] = []
        self._missing: list[EmbeddedAgain] = []
        self._embedded = self._resumed = 0

    def run(self, *, drop_missing: bool) -> UpgradeReport:
        """Embed what is not staged yet; adopt it when it is all of the index, or may be less."""
        started = time.monotonic()
        self._staging = GenerationWriter(self._folder, self._open_staging())
        self._staging.clean()
        self._drop_damaged()
        self._staged = Staged(Snapshot.open(self._folder))
        self._drop_stale()
        self._stage()
        published = drop_missing or not self._missing
        if published:
            for missing in self._missing:
                self._add(_as_missing(missing), None)
            self._publish()
            self._adopt()
        return UpgradeReport(
            embedded=self._embedded,
            resumed=self._resumed,
            missing=tuple(
                SkippedFile(path=self._snapshot.full_path(missing.item.place), reason=missing.reason or "")
                for missing in self._missing
            ),
            published=published,
            seconds=time.monotonic() - started,
        )

    def _open_staging(self) -> Manifest:
        """What an interrupted run for the same encoder has left, or an empty one.

        Raises IndexFormatError when that cannot be told: hours of work may lie there.
        """
        if _waits(self._folder):
            try:
                staged = read_manifest(self._folder, read_pointer(self._folder))
            except DamagedFileError as error:
                raise DamagedFileError(
                    what=f"an interrupted upgrade cannot go on: {error.what}",
                    where=error.where,
                    fix=f"mend it with: matvit repair {self._folder}, or remove that folder to begin anew",
                ) from error
            if _same_gallery(staged.encoder, self._entry):
                return staged
        _discard(self._folder)
        with writing(self._folder):
            make_folders(self._folder)
            manifest = self._snapshot.manifest.model_copy(
                update={
                    "generation": 1,
                    "parent": None,
                    "created": datetime.now(UTC),
                    "encoder": self._entry,
                    "index_type": "exact",
                    "approximate": None,
                    "segments": (),
                    "deletions": {},
                }
            )
            publish_manifest(self._folder, manifest)
        return manifest

    def _drop_damaged(self) -> None:
        """Forget staged segments that fail their hash: their pictures are embedded again."""
        manifest, damaged = self._staging.manifest, set[str]()
        for segment in manifest.segments:
            try:
                open_segment(self._folder, manifest, segment).embeddings()
            except DamagedFileError:
                damaged.add(segment.name)
        if damaged:
            self._staging.restore(
                [],
                instead_of=damaged,
                deletions=manifest.deletions,
                next_id=manifest.next_id,
                generation=manifest.generation + 1,
            )

    def _drop_stale(self) -> None:
        """Forget staged items that the index has deleted since."""
        live, _ = live_ids(self._snapshot)
        gone = {segment.entry.name: np.setdiff1d(segment.live_ids(), live) for segment in self._staged.segments}
        self._publish(deleted={name: ids.tolist() for name, ids in gone.items() if len(ids)})

    def _stage(self) -> None:
        total = sum(len(segment.live_rows()) for segment in self._snapshot.segments)
        encoder = self._encoder.encoder(self._entry.spec)
        results = embed_again(self._todo(), file_name=self._snapshot.file_name, encoder=encoder)
        with closing(results):  # Ctrl-C may fall between two of them
            for embedded in results:
                if embedded.embedding is None:
                    self._missing.append(embedded)
                else:
                    self._add(embedded.item, embedded.embedding)
                    self._embedded += 1
                done = self._resumed + self._embedded + len(self._missing)
                note = f"{len(self._missing)} missing" if self._missing else ""
                self._progress(ProgressEvent(stage="upgrade", done=done, total=total, unit="pictures", note=note))
        self._publish()

    def _todo(self) -> Iterator[Item]:
        """The pictures that must be embedded; skipped files are staged on the way."""
        live = (item for _, item in self._snapshot.live_items())
        while items := list(islice(live, _AT_ONCE)):
            done = self._staged.holds(items)
            self._resumed += sum(item.status == OK for item in items if item.id in done)
            for item in items:
                if item.id not in done and item.status == OK:
                    yield item
                elif item.id not in done:
                    self._add(item, None)

    def _add(self, item: Item, embedding: FloatArray | None) -> None:
        [home] = self._staged.homes_of(np.array([item.id]))
        before = self._staged.segments[home].entry.name if home >= 0 else None
        self._pending.append(Entry(item=replace(item, row=None), embedding=embedding, replaces=before))
        if self._pace.is_due(len(self._pending)):
            self._publish()

    def _publish(self, *, deleted: dict[str, list[int]] | None = None) -> None:
        if self._pending or deleted:
            manifest = self._snapshot.manifest
            self._staging.publish(self._pending, deleted=deleted or {}, roots=manifest.roots, next_id=manifest.next_id)
        self._pending = []
        self._pace.published()

    def _adopt(self) -> None:
        for _ in self._staging.compact():  # afterwards there are no deletions
            pass
        folder, manifest = self._snapshot.folder, self._staging.manifest
        with writing(folder):
            for segment in manifest.segments:
                _link_segment(self._folder / SEGMENTS / segment.name, folder / SEGMENTS / segment.name)
            sync_folder(folder / SEGMENTS)
        self._writer.adopt(manifest)
        self._writer.clean()
        remove_adopted(folder, self._writer.manifest)


def remove_adopted(folder: Path, manifest: Manifest) -> None:
    """Remove a staged upgrade that `manifest` has adopted already. Only while holding the writer's lock."""
    staging = folder / STAGING
    if not staging.is_dir():
        return
    with suppress(IndexFormatError):  # what cannot be read now is not lost: whoever goes on with it is told
        if not _waits(staging) or _same_gallery(
            read_manifest(staging, read_pointer(staging)).encoder, manifest.encoder
        ):
            _discard(staging)


def _waits(staging: Path) -> bool:
    """Whether an upgrade is staged there. Without CURRENT it is what the kill of a creation or a removal has left."""
    if not staging.is_dir():
        return False
    with reading(staging / CURRENT):
        try:
            (staging / CURRENT).lstat()
        except FileNotFoundError:
            return False
    return True


def _discard(staging: Path) -> None:
    with suppress(OSError):  # where the disk refuses, the next writer does it
        (staging / CURRENT).unlink(missing_ok=True)
        sync_folder(staging)  # before the rest goes: so no kill or loss of power leaves half of one that counts
        shutil.rmtree(staging)


def _same_gallery(one: EncoderEntry, other: EncoderEntry) -> bool:
    return (one.space_id, one.spec, one.embedding_dim) == (other.space_id, other.spec, other.embedding_dim)


def live_ids(snapshot: Snapshot) -> tuple[IntArray, IntArray]:
    """(N,) int64 of all items that count, and the place of each one's segment."""
    ids = [segment.live_ids() for segment in snapshot.segments]
    homes = np.repeat(np.arange(len(ids)), np.array([len(own) for own in ids], dtype=np.int64))
    return np.concatenate([np.empty(0, dtype=np.int64), *ids]), homes


def _as_missing(missing: EmbeddedAgain) -> Item:
    """A skipped item that keeps the id. It has no size, time or content: an ingest reads the file when it is back."""
    return replace(
        missing.item,
        status=SKIPPED,
        reason=f"not there when the index changed its encoder ({missing.reason})",
        content_sha256="",
        size=0,
        mtime_ns=NO_TIME,
        row=None,
    )


def _link_segment(source: Path, target: Path) -> None:
    """The same segment under another name, without copying where the file system can."""
    if target.exists():
        return
    building = temporary_name(target)
    building.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, building / file.name)  # the files are synced, and never written again
        except OSError:  # a file system without links
            shutil.copy2(file, building / file.name)
            with (building / file.name).open("rb+") as copy:
                os.fsync(copy.fileno())
    sync_folder(building)
    os.replace(building, target)  # noqa: PTH105 - tests inject failures into os
