"""Publishing a generation: segment, deletions, manifest and, last, CURRENT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from matvit.durable import sync_folder, temporary_name, write_atomic, write_synced
from matvit.preprocess import FloatArray
from retrieval.errors import DiskRefusalError
from retrieval.files import remove, remove_temporaries, sha256_bytes, sha256_file, writing
from retrieval.items import Item, write_items
from retrieval.manifest import (
    CACHE,
    DELETIONS,
    EMBEDDINGS,
    GENERATIONS,
    ITEMS,
    SEGMENTS,
    ApproximateEntry,
    AskedEntry,
    DeletionsEntry,
    EncoderEntry,
    FileEntry,
    FileName,
    IndexType,
    Manifest,
    Pointer,
    SegmentEntry,
    copy_of,
    generation_of,
    make_folders,
    manifest_name,
    publish_manifest,
    read_manifest,
    read_pointer,
    remove_unpublished,
)
from retrieval.snapshot import OpenSegment, open_segment, read_deletions

SMALL_ITEMS = 1024  # a segment with fewer items that count is small
MERGE_SEGMENTS = 8  # so many small ones are made one: a single picture then costs some 150 rows on average, at worst
MERGED_ITEMS = 16_384  # and no more than about so many items at a time, for the memory's sake
MANY_SEGMENTS = 128  # above it those that are not full are merged, too: approximate search keeps each one's file open


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One item to publish; its row is given when it is written."""

    item: Item
    embedding: FloatArray | None  # (D,) float32 of unit length; None for a skipped file
    replaces: str | None  # the segment whose item of the same id stops counting


class GenerationWriter:
    """Publishes generations of one index. Use it only while holding the writer's lock."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest  # the newest published generation
        self._published: Pointer | None = None  # what CURRENT was made by this writer

    def clean(self) -> None:
        """Remove whatever the newest generation does not name: unfinished files, and what it replaced.

        Readers have in memory what they need, or mapped; those that are just opening the generation before begin anew.
        Folders that are missing are made.
        """
        manifest = self.manifest
        named = {segment.name for segment in manifest.segments} | {entry.file for entry in manifest.deletions.values()}
        name = manifest_name(manifest.generation)
        named |= {name, copy_of(name)}
        if manifest.approximate is not None:
            named.add(manifest.approximate.file)
        with writing(self.folder):
            make_folders(self.folder)
            for name in ("", GENERATIONS, SEGMENTS, DELETIONS, CACHE):
                if not (self.folder / name).is_dir():  # only an index with an approximate part has a cache
                    continue
                remove_temporaries(self.folder / name)
                for path in (self.folder / name).iterdir() if name else ():
                    if path.name not in named:
                        remove(path)

    def catch_up(self) -> None:
        """After an interrupted `publish`: `self.manifest` becomes what CURRENT names, the generation before or its own.

        What it left unpublished is removed, so that the same number can be given again.
        """
        pointer = read_pointer(self.folder)
        if generation_of(Path(pointer.name)) not in (self.manifest.generation, self.manifest.generation + 1):
            raise self._replaced(pointer)
        self.manifest, self._published = read_manifest(self.folder, pointer), pointer
        with writing(self.folder):
            remove_unpublished(self.folder, newest=self.manifest.generation)

    def publish(
        self,
        entries: Sequence[Entry],
        *,
        deleted: Mapping[str, Iterable[int]],
        roots: Mapping[str, str],
        next_id: int,
    ) -> None:
        """Make one more generation; afterwards `self.manifest` is it.

        `deleted` maps segments to ids that stop counting, besides those that entries replace.
        Raises IngestError when the disk refuses; the generation before then still counts.
        """
        with writing(self.folder):
            segments, deletions = self.manifest.segments, dict(self.manifest.deletions)
            if entries:
                segment = _write_segment(self.folder, entries, self.manifest)
                segments = (*segments, segment)
            for name, ids in _stopped(entries, deleted).items():
                deletions[name] = self.write_deletions(name, ids)
            self._publish(segments=segments, deletions=deletions, roots=dict(roots), next_id=next_id)

    def publish_search(
        self, index_type: IndexType, *, reason: str, asked: AskedEntry, approximate: ApproximateEntry | None
    ) -> None:
        """Make one more generation that is searched in another way. Raises IngestError when the disk refuses."""
        with writing(self.folder):
            self._publish(index_type=index_type, index_reason=reason, index_asked=asked, approximate=approximate)

    def merge_small(self) -> bool:
        """Make one segment of several that are small, or not full where there are many; False when there is no need.

        It is one more generation. Raises IngestError when the disk refuses, IndexFormatError when a segment is damaged.
        """
        segments = self.manifest.segments
        full = MERGED_ITEMS if len(segments) > MANY_SEGMENTS else SMALL_ITEMS
        found = [segment for segment in segments if self._live_items(segment) < full]
        if len(found) < MERGE_SEGMENTS:
            return False
        self._rewrite(sorted(found, key=self._live_items))  # the smallest first: fewest rows for each segment less
        return True

    def compact(self) -> Iterator[int]:
        """Make full segments of all that hold less, or items that no longer count; yields how many are left to do.

        Each step is one more generation. Raises what `merge_small` raises.
        """
        while wasteful := self._wasteful():
            yield len(wasteful)
            self._rewrite(wasteful)

    def _wasteful(self) -> list[SegmentEntry]:
        manifest = self.manifest
        found = [entry for entry in manifest.segments if entry.name in manifest.deletions or entry.items < MERGED_ITEMS]
        alone = len(found) == 1 and found[0].items > 0 and found[0].name not in manifest.deletions
        return [] if alone else found

    def _rewrite(self, segments: Sequence[SegmentEntry]) -> None:
        """Publish what counts of the first of `segments`, up to about MERGED_ITEMS, as one segment instead of them."""
        merged = dict[str, SegmentEntry]()
        entries: list[Entry] = []
        for entry in segments:
            if len(entries) < MERGED_ITEMS:
                entries += _live_entries(open_segment(self.folder, self.manifest, entry))
                merged[entry.name] = entry
        with writing(self.folder):
            kept = [segment for segment in self.manifest.segments if segment.name not in merged]
            if entries:
                kept.append(_write_segment(self.folder, entries, self.manifest))
            self._publish(
                segments=tuple(kept),
                deletions={name: gone for name, gone in self.manifest.deletions.items() if name not in merged},
            )

    def adopt(self, staged: Manifest) -> None:
        """Publish another encoder's gallery, whose segments lie in this index's folder already, as the next generation.

        Every vector is compared until `refresh` builds the approximate index that was asked for: the old one is of
        another space. Raises IngestError when the disk refuses.
        """
        with writing(self.folder):
            self._publish(
                segments=staged.segments,
                deletions={},
                next_id=max(self.manifest.next_id, staged.next_id),  # ids may have been given away since it was staged
                encoder=staged.encoder,
                index_type="exact",
                index_asked=self.manifest.asked.model_copy(update={"chosen": "exact"}),
                approximate=None,
            )

    def publish_encoder(self, encoder: EncoderEntry) -> None:
        """Make one more generation that names another place for the same encoder.

        Raises IngestError when the disk refuses.
        """
        with writing(self.folder):
            self._publish(encoder=encoder)

    def write_segment(self, entries: Sequence[Entry]) -> SegmentEntry:
        """Write a segment that nothing names yet. Raises IngestError when the disk refuses."""
        with writing(self.folder):
            return _write_segment(self.folder, entries, self.manifest)

    def restore(
        self,
        segments: Sequence[SegmentEntry],
        *,
        instead_of: set[str],
        deletions: dict[str, DeletionsEntry],
        next_id: int,
        generation: int,
    ) -> None:
        """Publish a repaired state as `generation`: written `segments` instead of those named `instead_of`.

        Raises IngestError when the disk refuses; what was damaged lies as it was.
        """
        with writing(self.folder):
            kept = [segment for segment in self.manifest.segments if segment.name not in instead_of]
            self._publish(
                segments=(*kept, *segments),
                deletions={name: gone for name, gone in deletions.items() if name not in instead_of},
                next_id=next_id,
                generation=generation,
            )

    def _live_items(self, segment: SegmentEntry) -> int:
        deletions = self.manifest.deletions.get(segment.name)
        return segment.items - (deletions.count if deletions else 0)

    def _publish(self, **changed: Any) -> None:
        """Publish the newest manifest with some fields changed; `self.manifest` stays what it was if that fails."""
        manifest = self.manifest
        following = {"generation": manifest.generation + 1, "parent": manifest.generation, "created": datetime.now(UTC)}
        manifest = Manifest(**{**dict(manifest), **following, **changed})
        if "generation" not in changed:  # a repair may have no CURRENT
            self._check_current()
        self._published = publish_manifest(self.folder, manifest)
        self.manifest = manifest

    def _check_current(self) -> None:
        """Raises DiskRefusalError unless CURRENT is as this writer knows it: its lock guards the folder, not the name.

        A folder that was moved away, and another one put in its place, may have a writer of its own.
        """
        pointer = read_pointer(self.folder)
        known = pointer.name == manifest_name(self.manifest.generation)
        if not known or self._published not in (None, pointer):
            raise self._replaced(pointer)

    def _replaced(self, pointer: Pointer) -> DiskRefusalError:
        return DiskRefusalError(
            what=f"the index was moved or replaced while it was written (it is at {pointer.name} now, not at "
            f"{manifest_name(self.manifest.generation)})",
            where=str(self.folder),
            fix="run the same again",
        )

    def write_deletions(self, segment: str, ids: set[int]) -> DeletionsEntry:
        """Write what `segment` has lost by now, with `ids`; nothing names it yet."""
        ids = ids | set(read_deletions(self.folder, self.manifest, segment).tolist())
        data = np.array(sorted(ids), dtype="<i8").tobytes()
        sha256 = sha256_bytes(segment.encode("ascii") + data)[:16]  # two segments may lose equal ids
        name = f"{sha256}.i64"
        write_atomic(self.folder / DELETIONS / name, data)
        return DeletionsEntry(file=name, bytes=len(data), sha256=sha256_bytes(data), count=len(ids))


def _live_entries(segment: OpenSegment) -> Iterator[Entry]:
    embeddings = segment.embeddings() if len(segment.live_rows()) else ()  # where none counts, they may be damaged
    for item in segment.live(segment.items.all()):
        embedding = None if item.row is None else np.array(embeddings[item.row])
        yield Entry(item=replace(item, row=None), embedding=embedding, replaces=None)


def _stopped(entries: Sequence[Entry], deleted: Mapping[str, Iterable[int]]) -> dict[str, set[int]]:
    stopped = {segment: set(ids) for segment, ids in deleted.items()}
    for entry in entries:
        if entry.replaces is not None:
            stopped.setdefault(entry.replaces, set()).add(entry.item.id)
    return {segment: ids for segment, ids in stopped.items() if ids}


def _write_segment(folder: Path, entries: Sequence[Entry], parent_manifest: Manifest) -> SegmentEntry:
    parent = folder / SEGMENTS
    building = temporary_name(parent / "segment")
    try:
        building.mkdir()
        rows = [entry.embedding for entry in entries if entry.embedding is not None]
        write_synced(building / EMBEDDINGS, *(row.astype("<f4", copy=False).data for row in rows))
        write_items(building / ITEMS, _with_rows(entries))
        sync_folder(building)
        names: tuple[FileName, ...] = (EMBEDDINGS, ITEMS)
        files = {name: _file_entry(building / name) for name in names}
        name = _segment_name(parent_manifest.generation, files)
        if (parent / name).exists():  # an interrupted publication of these very entries is repeated
            shutil.rmtree(building)
        else:
            os.replace(building, parent / name)  # noqa: PTH105 - tests inject failures into os
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(parent)
    return SegmentEntry(name=name, rows=len(rows), items=len(entries), files=files)


def _segment_name(generation: int, files: Mapping[FileName, FileEntry]) -> str:
    # The generation makes a file that was changed and then changed back a new segment, not the old one again.
    hashes = " ".join([str(generation), *(file.sha256 for file in files.values())])
    return sha256_bytes(hashes.encode("ascii"))[:16]


def _with_rows(entries: Sequence[Entry]) -> Iterator[Item]:
    row = 0
    for entry in entries:
        if entry.embedding is None:
            yield entry.item
        else:
            yield replace(entry.item, row=row)
            row += 1


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
