"""One generation, checked against its hashes, embeddings when they are first used; no file of it stays open."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from retrieval.files import CheckedOnce, check_file, damaged, reading
from retrieval.items import Item, ItemStore, Place
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
    read_current,
    read_manifest,
)
from retrieval.types import IndexInfo, SkippedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSegment:
    """One segment of R embeddings of width D, as one generation sees it; it holds no file open.

    Its items are checked. Its embeddings are checked when they are first used: hashing them takes longer than all else.
    """

    entry: SegmentEntry
    folder: Path
    dim: int  # D
    row_ids: IntArray  # (R,) int64, the item of each row
    skipped: tuple[Item, ...]  # the items without a row
    deleted: IntArray  # (X,) int64, sorted ids that no longer count
    embeddings_file: CheckedOnce

    @property
    def items(self) -> ItemStore:
        """The segment's items, read from its file."""
        return ItemStore(self.folder / ITEMS)

    def embeddings(self) -> FloatArray:
        """(R, D) float32, memory-mapped: the file is open for as long as the array lives.

        Raises IndexFormatError when they are not what was written.
        """
        return map_embeddings(self.embeddings_file.path(), rows=self.entry.rows, dim=self.dim)

    def live_rows(self) -> IntArray:
        """(L,) int64 row numbers that still count."""
        return np.flatnonzero(~np.isin(self.row_ids, self.deleted)).astype(np.int64)

    def all_ids(self) -> IntArray:
        """(I,) int64 of its items, skipped files included."""
        return np.concatenate([self.row_ids, np.array([item.id for item in self.skipped], dtype=np.int64)])

    def live_ids(self) -> IntArray:
        """Those of them that still count."""
        ids = self.all_ids()
        return ids[~np.isin(ids, self.deleted)]

    def live(self, items: Iterable[Item]) -> Iterator[Item]:
        """Those of `items` that still count."""
        gone = set(self.deleted.tolist())
        return (item for item in items if item.id not in gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A generation: manifest, items and deletions checked, embeddings by their size."""

    folder: Path
    pointer: Pointer
    manifest: Manifest
    segments: tuple[OpenSegment, ...]
    bytes: int  # of all files that the generation names

    def __str__(self) -> str:
        encoder = self.manifest.encoder
        made = f"made by {encoder.name}, {encoder.spec} at {encoder.resolution} px"
        return f"{self.pictures} pictures, generation {self.manifest.generation}, {made}"

    @property
    def pictures(self) -> int:
        """How many can be found."""
        return sum(len(segment.live_rows()) for segment in self.segments)

    @classmethod
    def open(cls, folder: Path, *, reuse: Snapshot | None = None) -> Snapshot:
        """The generation that CURRENT names. Raises IndexFormatError.

        Segments that `reuse`, an earlier generation, has checked already are taken from there.
        """
        return read_current(folder, lambda pointer: cls._open(folder, pointer, reuse))

    @classmethod
    def _open(cls, folder: Path, pointer: Pointer, reuse: Snapshot | None) -> Snapshot:
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
        heads = (folder / CURRENT, *[folder / GENERATIONS / pointer.name] * 2)  # of which there is a copy
        with reading(folder / CURRENT):
            size = sum(path.stat().st_size for path in heads)
        size += sum(file.bytes for entry in manifest.segments for file in entry.files.values())
        size += sum(entry.bytes for entry in manifest.deletions.values())
        size += 0 if manifest.approximate is None else manifest.approximate.bytes
        return cls(folder=folder, pointer=pointer, manifest=manifest, segments=segments, bytes=size)

    def full_path(self, place: Place) -> Path:
        """The absolute path of an item's file."""
        return Path(self.file_name(place))

    def file_name(self, place: Place) -> str:
        """The same as text: a Path for each of many items would take long."""
        return place_name(self.manifest, place)

    def live_items(self) -> Iterator[tuple[OpenSegment, Item]]:
        """Every item that counts, skipped files included, with its segment."""
        for segment in self.segments:
            for item in segment.live(segment.items.all()):
                yield segment, item

    def info(self) -> IndexInfo:
        """What this generation holds."""
        manifest, encoder = self.manifest, self.manifest.encoder
        return IndexInfo(
            path=self.folder,
            items=self.pictures,
            generation=manifest.generation,
            index_type=manifest.index_type,
            index_reason=manifest.index_reason,
            index_parameters=_parameters(manifest),
            recall_at_10=None if manifest.approximate is None else manifest.approximate.recall_at_10,
            bytes=self.bytes,
            embedding_dim=encoder.embedding_dim,
            space_id=encoder.space_id,
            weights_sha256=encoder.weights_sha256,
            encoder_name=encoder.name,
            encoder_source=encoder.source,
            encoder_revision=encoder.revision,
            encoder_spec=encoder.spec,
            encoder_resolution=encoder.resolution,
            skipped=tuple(
                SkippedFile(path=self.full_path(item.place), reason=item.reason or "")
                for segment in self.segments
                for item in segment.live(segment.skipped)
            ),
        )


def _parameters(manifest: Manifest) -> dict[str, int]:
    entry = manifest.approximate
    if entry is None:
        return {}
    return {**entry.parameters, "effort": entry.effort, "depth": entry.depth, "held_out": entry.held_out}


def live_embeddings(segments: Iterable[OpenSegment]) -> Iterator[tuple[FloatArray, IntArray]]:
    """Of each segment with rows that still count, all embeddings and the numbers of these rows.

    What others hold need not be whole. Raises IndexFormatError for those that are not what was written.
    """
    for segment in segments:
        if len(rows := segment.live_rows()):
            yield segment.embeddings(), rows


def map_embeddings(path: Path, *, rows: int, dim: int) -> FloatArray:
    """(rows, dim) float32, memory-mapped: the file is open for as long as the array lives. Raises IndexFormatError."""
    if rows == 0:  # an empty file cannot be mapped
        return np.empty((0, dim), dtype=np.float32)
    with reading(path):
        return np.memmap(path, dtype="<f4", mode="r", shape=(rows, dim))


def place_name(manifest: Manifest, place: Place) -> str:
    """The absolute path of an item's file, as text."""
    root, path = place
    return os.path.join(manifest.roots[root], os.fsdecode(path))  # noqa: PTH118


def open_segment(folder: Path, manifest: Manifest, entry: SegmentEntry) -> OpenSegment:
    """One segment of a generation: its items checked, its embeddings by their size. Raises IndexFormatError."""
    home, dim = folder / SEGMENTS / entry.name, manifest.encoder.embedding_dim
    vectors, table = entry.files[EMBEDDINGS], entry.files[ITEMS]
    embeddings_file = CheckedOnce(home / EMBEDDINGS, size=vectors.bytes, sha256=vectors.sha256)
    check_file(home / ITEMS, size=table.bytes, sha256=table.sha256)
    items = ItemStore(home / ITEMS)
    items.check_places(manifest.roots)
    row_ids = items.row_ids()
    if len(row_ids) != entry.rows:
        raise damaged(home / ITEMS, f"has {len(row_ids)} rows instead of {entry.rows}")
    if vectors.bytes != entry.rows * dim * 4:
        raise damaged(home / EMBEDDINGS, f"does not hold {entry.rows} embeddings of width {dim}")
    return OpenSegment(
        entry=entry,
        folder=home,
        dim=dim,
        row_ids=row_ids,
        skipped=tuple(items.skipped()),
        deleted=read_deletions(folder, manifest, entry.name),
        embeddings_file=embeddings_file,
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
