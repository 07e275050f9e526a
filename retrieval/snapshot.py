"""One opened generation: checked against its hashes, then read-only for as long as it is held."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from matvit.preprocess import FloatArray
from retrieval.errors import IndexFormatError
from retrieval.files import check_file, damaged, reading
from retrieval.items import SKIPPED, IntArray, Item, ItemStore
from retrieval.manifest import (
    CURRENT,
    DELETIONS,
    EMBEDDINGS,
    GENERATIONS,
    ITEMS,
    SEGMENTS,
    Manifest,
    Pointer,
    SegmentEntry,
    read_manifest,
    read_pointer,
)
from retrieval.types import IndexInfo, SkippedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSegment:
    """One segment of R embeddings of width D, as one generation sees it."""

    entry: SegmentEntry
    embeddings: FloatArray  # (R, D) float32, memory-mapped
    row_ids: IntArray  # (R,) int64, the item of each row
    deleted: IntArray  # (X,) int64, sorted ids that no longer count
    items: ItemStore

    def live_rows(self) -> IntArray:
        """(L,) int64 row numbers that still count."""
        return np.flatnonzero(~np.isin(self.row_ids, self.deleted)).astype(np.int64)

    def live_items(self) -> Iterator[Item]:
        """Items that still count, skipped files included, by id."""
        gone = set(self.deleted.tolist())
        return (item for item in self.items.all() if item.id not in gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A generation and its open files."""

    folder: Path
    pointer: Pointer
    manifest: Manifest
    segments: tuple[OpenSegment, ...]

    @classmethod
    def open(cls, folder: Path, *, reuse: Snapshot | None = None) -> Snapshot:
        """The generation that CURRENT names. Raises IndexFormatError.

        Every byte is checked, except segments that `reuse`, an earlier generation, has open already.
        """
        pointer = read_pointer(folder)
        if reuse is not None and pointer == reuse.pointer:
            return reuse
        manifest = read_manifest(folder, pointer)
        opened = {segment.entry.name: segment for segment in reuse.segments} if reuse else {}
        segments = tuple(
            replace(opened[entry.name], deleted=read_deletions(folder, manifest, entry.name))
            if entry.name in opened and opened[entry.name].entry == entry
            else open_segment(folder, manifest, entry)
            for entry in manifest.segments
        )
        return cls(folder=folder, pointer=pointer, manifest=manifest, segments=segments)

    def full_path(self, item: Item) -> Path:
        """The absolute path of an item's file."""
        return Path(self.manifest.roots[item.root], os.fsdecode(item.path))

    def live_items(self) -> Iterator[tuple[OpenSegment, Item]]:
        """Every item that counts, skipped files included, with its segment."""
        for segment in self.segments:
            for item in segment.live_items():
                yield segment, item

    def info(self) -> IndexInfo:
        """What this generation holds."""
        manifest, encoder = self.manifest, self.manifest.encoder
        names = [CURRENT, f"{GENERATIONS}/{self.pointer.name}"]
        in_segments = [file.bytes for segment in manifest.segments for file in segment.files.values()]
        in_deletions = [entry.bytes for entry in manifest.deletions.values()]
        return IndexInfo(
            path=self.folder,
            items=sum(len(segment.live_rows()) for segment in self.segments),
            generation=manifest.generation,
            index_type=manifest.index_type,
            bytes=sum((self.folder / name).stat().st_size for name in names) + sum(in_segments) + sum(in_deletions),
            embedding_dim=encoder.embedding_dim,
            space_id=encoder.space_id,
            weights_sha256=encoder.weights_sha256,
            encoder_name=encoder.name,
            encoder_source=encoder.source,
            encoder_spec=encoder.spec,
            encoder_resolution=encoder.resolution,
            skipped=tuple(
                SkippedFile(path=self.full_path(item), reason=item.reason or "")
                for _, item in self.live_items()
                if item.status == SKIPPED
            ),
        )


def open_segment(folder: Path, manifest: Manifest, entry: SegmentEntry) -> OpenSegment:
    """One segment of a generation, every byte checked. Raises IndexFormatError."""
    home = folder / SEGMENTS / entry.name
    for name, file in entry.files.items():
        check_file(home / name, size=file.bytes, sha256=file.sha256)
    items = ItemStore(home / ITEMS)
    row_ids = items.row_ids()
    if len(row_ids) != entry.rows:
        raise damaged(home / ITEMS, f"has {len(row_ids)} rows instead of {entry.rows}")
    return OpenSegment(
        entry=entry,
        embeddings=_map_embeddings(home / EMBEDDINGS, rows=entry.rows, dim=manifest.encoder.embedding_dim),
        row_ids=row_ids,
        deleted=read_deletions(folder, manifest, entry.name),
        items=items,
    )


def read_deletions(folder: Path, manifest: Manifest, segment: str) -> IntArray:
    """(X,) int64 sorted ids deleted from `segment`; empty when there are none. Raises IndexFormatError."""
    entry = manifest.deletions.get(segment)
    if entry is None:
        return np.empty(0, dtype=np.int64)
    path = folder / DELETIONS / entry.file
    check_file(path, size=entry.bytes, sha256=entry.sha256)
    with reading(path):
        ids = np.frombuffer(path.read_bytes(), dtype="<i8").astype(np.int64)
    if len(ids) != entry.count:
        raise damaged(path, f"has {len(ids)} ids instead of {entry.count}")
    return ids


def _map_embeddings(path: Path, *, rows: int, dim: int) -> FloatArray:
    if path.stat().st_size != rows * dim * 4:
        raise IndexFormatError(
            what=f"the file does not hold {rows} embeddings of width {dim}",
            where=str(path),
            fix="index the pictures again in a new folder",
        )
    if rows == 0:  # an empty file cannot be mapped
        return np.empty((0, dim), dtype=np.float32)
    return np.memmap(path, dtype="<f4", mode="r", shape=(rows, dim))
