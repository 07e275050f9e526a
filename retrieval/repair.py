"""Making a damaged index whole, as far as that can be proven; what cannot be brought back is named.

The start is the generation that CURRENT names, by its manifest or the manifest's copy. Where neither is whole: the
newest one whose files are all whole, else the newest that can be read. Pictures whose embeddings are damaged are
embedded once more from their files; of damaged items those count that their own checksum proves. Nothing is removed
before the repaired generation is published.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from matvit.encoder import ElasticEncoder, ImageEncoder, is_unit
from matvit.errors import MatVitError
from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from matvit.regular import read_small
from retrieval.encoders import check_encoder, load_encoder
from retrieval.errors import DamagedFileError, IndexFormatError
from retrieval.files import check_file, exhausted, reading, sha256_bytes, writing
from retrieval.items import OK, Item, ItemStore
from retrieval.lock import writer_lock
from retrieval.manifest import (
    CACHE,
    CURRENT,
    DELETIONS,
    EMBEDDINGS,
    GENERATIONS,
    ITEMS,
    SEGMENTS,
    DeletionsEntry,
    FileName,
    Manifest,
    SegmentEntry,
    check_kinds,
    copy_of,
    generation_of,
    is_index,
    make_folders,
    parse_manifest,
    read_pointer,
)
from retrieval.reembed import embed_again
from retrieval.snapshot import OpenSegment, Snapshot, map_embeddings, open_segment, place_name, read_deletions
from retrieval.types import RepairReport, SkippedFile
from retrieval.verify import segment_problems, verify_index
from retrieval.writer import MERGED_ITEMS, Entry, GenerationWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Damaged:
    """One segment that fails a check."""

    entry: SegmentEntry
    proven: bool  # whether all items are what was written
    embeddings: FloatArray | None  # (R, D) float32, memory-mapped; None: damaged
    pictures: int  # that can be read and still count
    unnamed: int  # items that cannot be read


def repair_index(folder: Path, *, encoder: ElasticEncoder | None, drop_lost: bool, progress: Progress) -> RepairReport:
    """See `retrieval.Index.repair`."""
    if not is_index(folder):
        read_pointer(folder)  # raises
    check_kinds(folder)
    with writer_lock(folder):
        with writing(folder):
            make_folders(folder)
        damage: list[str] = []
        base, is_current = _find_base(folder, damage)
        repair = _Repair(folder, base, is_current=is_current, damage=damage, encoder=encoder, progress=progress)
        return repair.run(drop_lost=drop_lost)


class _Repair:
    def __init__(
        self,
        folder: Path,
        base: Manifest,
        *,
        is_current: bool,
        damage: list[str],
        encoder: ElasticEncoder | None,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._base = base
        self._is_current = is_current  # whether CURRENT names it: later ones were never published
        self._damage = damage
        self._encoder = encoder
        self._progress = progress
        self._lost: list[SkippedFile] = []
        self._embedded = 0
        self._held: IntArray = np.empty(0, dtype=np.int64)  # sorted ids of the items that are whole or brought back

    def run(self, *, drop_lost: bool) -> RepairReport:
        # Without the deletions that are lost, so that segments can be opened.
        self._base = self._base.model_copy(update={"deletions": self._whole_deletions()})
        segments = self._sort_segments()
        damaged = [segment for segment in segments if isinstance(segment, _Damaged)]
        writer, kept = GenerationWriter(self._folder, self._base), set(_entries(self._folder / SEGMENTS))
        try:
            restored, deletions = self._restore(segments, writer)
            unnamed = sum(segment.unnamed for segment in damaged) + self._lose_later()
        except BaseException:
            self._remove_segments(but=kept)
            raise
        if (self._lost or unnamed) and not drop_lost:
            self._remove_segments(but=kept)
            return self._report(unnamed, generation=self._base.generation, removed=(), whole=False)
        if self._damage:
            writer.restore(
                restored[::-1],
                instead_of={segment.entry.name for segment in damaged},
                deletions=deletions,
                next_id=max(self._base.next_id, int(self._held.max(initial=-1)) + 1),
                generation=max([self._base.generation, *map(_number, _manifests(self._folder))]) + 1,
            )
        opened = Snapshot.open(self._folder)  # nothing is removed before this succeeds
        before = _names(self._folder)
        writer.clean()  # a manifest that CURRENT never named would stand in the way of one with another cache
        self._rebuild_cache(writer, opened)
        writer.clean()
        removed = tuple(sorted(before - _names(self._folder)))
        left = verify_index(self._folder).problems if self._damage else ()
        self._damage += [f"not mended: {problem}" for problem in left]
        return self._report(unnamed, generation=writer.manifest.generation, removed=removed, whole=not left)

    def _rebuild_cache(self, writer: GenerationWriter, opened: Snapshot) -> None:
        from retrieval.backends.cache import check_cache, refresh  # imports faiss

        entry = writer.manifest.approximate
        if entry is None:
            return
        damaged = False
        try:
            check_cache(self._folder, writer.manifest, entry, opened.segments)
        except DamagedFileError as error:
            self._damage.append(f"{error.where}: {error.what}")
            damaged = True
        refresh(writer, progress=self._progress, anew=damaged)

    def _report(self, unnamed: int, *, generation: int, removed: tuple[str, ...], whole: bool) -> RepairReport:
        return RepairReport(
            damage=tuple(self._damage),
            embedded=self._embedded,
            lost=tuple(self._lost),
            lost_unnamed=unnamed,
            removed=removed,
            generation=generation,
            whole=whole,
        )

    def _remove_segments(self, *, but: set[Path]) -> None:
        """Remove what was written and will not be published, while the index may still have use for what was there."""
        for home in set(_entries(self._folder / SEGMENTS)) - but:
            shutil.rmtree(home, ignore_errors=True)

    def _lose_later(self) -> int:
        """List the items of segments that only later manifests, which are lost, have named; gives the unnamed ones."""
        if self._is_current or self._base.generation >= max([0, *map(_number, _manifests(self._folder))]):
            return 0
        unnamed = 0
        named = {entry.name for entry in self._base.segments}
        for home in _entries(self._folder / SEGMENTS):
            if home.name in named or not re.fullmatch("[0-9a-f]{16}", home.name):
                continue
            for item, _ in self._new(_readable(home)):
                if item.status == OK and self._is_ours(item):
                    self._lose(item, "it came with a generation whose manifest is lost")
                elif item.status == OK:
                    unnamed += 1
        return unnamed

    def _whole_deletions(self) -> dict[str, DeletionsEntry]:
        kept = {}
        for segment, entry in self._base.deletions.items():
            try:
                read_deletions(self._folder, self._base, segment)
                kept[segment] = entry
            except DamagedFileError as error:
                self._damage.append(
                    f"{error.where}: {error.what}; of the {entry.count} items that it forgot, those that "
                    "were deleted, not replaced, may be back"
                )
        return kept

    def _sort_segments(self) -> list[OpenSegment | _Damaged]:
        """Every one, in the manifest's order."""
        found: list[OpenSegment | _Damaged] = []
        total = len(self._base.segments)
        for done, entry in enumerate(self._base.segments, start=1):
            try:
                segment = open_segment(self._folder, self._base, entry)
                self._raise_next_id(segment)
                problems = list(segment_problems(segment, self._base))
                self._damage += problems
                found.append(self._read_damaged(entry) if problems else segment)
            except DamagedFileError as error:
                self._damage.append(f"{error.where}: {error.what}")
                found.append(self._read_damaged(entry))
            self._progress(ProgressEvent(stage="repair", done=done, total=total, unit="segments"))
        return found

    def _raise_next_id(self, segment: OpenSegment) -> None:
        next_id = int(segment.all_ids().max(initial=-1)) + 1
        if next_id > self._base.next_id:
            self._damage.append(f"segment {segment.entry.name}: items have ids that were never given away")
            self._base = self._base.model_copy(update={"next_id": next_id})

    def _read_damaged(self, entry: SegmentEntry) -> _Damaged:
        proven = self._is_written(entry, ITEMS)
        items = pictures = 0
        for item, _ in self._items_of(entry, proven=proven):
            items += 1
            pictures += item.status == OK
        live = entry.items - len(read_deletions(self._folder, self._base, entry.name))
        return _Damaged(
            entry=entry,
            proven=proven,
            embeddings=self._whole_embeddings(entry),
            pictures=pictures,
            unnamed=max(0, live - items),
        )

    def _is_written(self, entry: SegmentEntry, name: FileName) -> bool:
        file = entry.files[name]
        try:
            check_file(self._folder / SEGMENTS / entry.name / name, size=file.bytes, sha256=file.sha256)
        except DamagedFileError:
            return False
        return True

    def _whole_embeddings(self, entry: SegmentEntry) -> FloatArray | None:
        dim = self._base.encoder.embedding_dim
        if entry.files[EMBEDDINGS].bytes != entry.rows * dim * 4 or not self._is_written(entry, EMBEDDINGS):
            return None
        return map_embeddings(self._folder / SEGMENTS / entry.name / EMBEDDINGS, rows=entry.rows, dim=dim)

    def _items_of(self, entry: SegmentEntry, *, proven: bool) -> Iterator[tuple[Item, bool]]:
        """Those of a damaged segment that can be read and still count, and whether they are what was written."""
        gone = set(read_deletions(self._folder, self._base, entry.name).tolist())
        for item, is_sound in _readable(self._folder / SEGMENTS / entry.name):
            if item.id not in gone and self._is_ours(item):
                yield item, proven or is_sound

    def _is_ours(self, item: Item) -> bool:
        root, path = item.place
        parts = path.split(b"/") if isinstance(path, bytes) else [b".."]
        outside = not path or b"\0" in path or path.startswith(b"/") or b".." in parts
        return root in self._base.roots and not outside

    def _restore(
        self, segments: Sequence[OpenSegment | _Damaged], writer: GenerationWriter
    ) -> tuple[list[SegmentEntry], dict[str, DeletionsEntry]]:
        """What is written in place of damaged segments, newest first, and the deletions.

        Where deletions are lost, the newest record of a picture counts: those that it proves are made good.
        """
        deletions, restored = dict(self._base.deletions), list[SegmentEntry]()
        total = sum(segment.pictures for segment in segments if isinstance(segment, _Damaged))
        for segment in reversed(segments):
            if isinstance(segment, _Damaged):
                restored += self._bring_back(segment, writer, total=total)
                continue
            own, name = segment.live_ids(), segment.entry.name
            if len(doubles := np.intersect1d(own, self._held)):
                with writing(self._folder):
                    deletions[name] = writer.write_deletions(name, set(doubles.tolist()))
            self._held = np.union1d(self._held, own)
        return restored, deletions

    def _bring_back(self, segment: _Damaged, writer: GenerationWriter, *, total: int) -> Iterator[SegmentEntry]:
        """A segment in place of a damaged one, or several where it is large, of what can be; nothing names them."""
        items = self._sound(segment)
        while some := list({item.id: item for item in islice(items, MERGED_ITEMS)}.values()):
            if entries := list(self._entries_of(some, segment.embeddings, total=total)):
                written = writer.write_segment(entries)
                del entries  # or they would be in memory with the next ones
                yield written
            self._held = np.union1d(self._held, [item.id for item in some]).astype(np.int64)

    def _sound(self, segment: _Damaged) -> Iterator[Item]:
        """Those that are not held yet, and are what was written; the others of them are lost."""
        for item, is_sound in self._new(self._items_of(segment.entry, proven=segment.proven)):
            if is_sound:
                yield item
            else:
                self._lose(item, "its record is damaged; index it again")

    def _new(self, records: Iterable[tuple[Item, bool]]) -> Iterator[tuple[Item, bool]]:
        """Those that are not held yet."""
        for item, is_sound in records:
            place = int(np.searchsorted(self._held, item.id))
            if place == len(self._held) or self._held[place] != item.id:
                yield item, is_sound

    def _entries_of(self, items: Sequence[Item], embeddings: FloatArray | None, *, total: int) -> Iterator[Entry]:
        damaged = []
        for item in items:
            row = _row(item, embeddings)
            if item.status == OK and row is None:
                damaged.append(item)
            else:
                yield Entry(item=replace(item, row=None), embedding=row, replaces=None)
        yield from self._embed(damaged, total=total)

    def _embed(self, pictures: Sequence[Item], *, total: int) -> Iterator[Entry]:
        if not pictures:
            return
        if isinstance(encoder := self._gallery_encoder, MatVitError):
            for item in pictures:
                self._lose(item, f"its embedding is damaged, and there is no encoder ({encoder.what})")
            return
        again = embed_again(pictures, file_name=self._file_name, encoder=encoder)
        for item, embedded in zip(pictures, again, strict=True):
            if embedded.embedding is None:
                self._lose(item, f"its embedding is damaged, and its file: {embedded.reason}")
            else:
                self._embedded += 1
                yield Entry(item=embedded.item, embedding=embedded.embedding, replaces=None)
            done = self._embedded + len(self._lost)
            self._progress(ProgressEvent(stage="embed", done=done, total=total, unit="pictures"))

    @cached_property
    def _gallery_encoder(self) -> ImageEncoder | MatVitError:
        """What embeds pictures once more, or why there is none."""
        entry = self._base.encoder
        try:
            elastic = self._encoder or load_encoder(entry, index=self._folder)
            check_encoder(elastic, entry, index=self._folder)
        except MatVitError as error:
            if exhausted(error):
                raise
            return error
        return elastic.encoder(entry.spec)

    def _lose(self, item: Item, reason: str) -> None:
        self._lost.append(SkippedFile(path=Path(self._file_name(item.place)), reason=reason))

    def _file_name(self, place: tuple[str, bytes]) -> str:
        return place_name(self._base, place)


def _find_base(folder: Path, damage: list[str]) -> tuple[Manifest, bool]:
    """The generation to start from, and whether CURRENT names it.

    What is wrong with CURRENT, its manifest and the copy is added to `damage`.

    Raises IndexFormatError for a newer format: what is whole needs no repair.
    """
    try:
        pointer = read_pointer(folder)
    except DamagedFileError as error:
        damage.append(f"{error.where}: {error.what}")
        return _newest(folder, damage), False
    path, copy = (folder / GENERATIONS / name for name in (pointer.name, copy_of(pointer.name)))
    read = {one: _read(one, damage) for one in (path, copy) if one == path or one.exists()}
    hashes = {one: sha256_bytes(data) for one, data in read.items() if data is not None}
    published = [one for one, sha256 in hashes.items() if sha256 == pointer.sha256]
    if not published and path in hashes and hashes[path] == hashes.get(copy):
        damage.append(f"{folder / CURRENT}: names its manifest by a damaged sha256")
        published = [path]
    else:
        damage += [f"{one}: is not what was published" for one in hashes if one not in published]
    for one in published[:1]:
        try:
            return parse_manifest(read[one] or b"", path=one), True
        except DamagedFileError as error:  # no bit of it changed since: it was written so
            damage.append(f"{error.where}: {error.what}")
    return _newest(folder, damage), False


def _read(path: Path, damage: list[str]) -> bytes | None:
    try:
        with reading(path):
            return read_small(path)
    except DamagedFileError as error:
        damage.append(f"{error.where}: {error.what}")
        return None


def _newest(folder: Path, damage: list[str]) -> Manifest:
    """The newest whole generation, else the newest that can be read."""
    found: Manifest | None = None
    for path in sorted(_manifests(folder), key=_number, reverse=True):
        try:
            with reading(path):
                manifest = parse_manifest(read_small(path), path=path)
        except DamagedFileError as error:
            if (told := f"{error.where}: {error.what}") not in damage:
                damage.append(told)
            continue
        if _is_whole(folder, manifest):
            found = manifest
            break
        found = found or manifest
    if found is None:
        raise IndexFormatError(
            what="no manifest can be read, so nothing says what its files are",
            where=str(folder),
            fix="restore the index from a copy, or index the pictures again in a new folder",
        )
    damage.append(
        f"generation {found.generation} is the newest that can be used; run matvit index again for what is not in it"
    )
    return found


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    try:
        for entry in manifest.segments:
            open_segment(folder, manifest, entry).embeddings()
    except DamagedFileError:
        return False
    return True


def _manifests(folder: Path) -> list[Path]:
    """The manifests and their copies."""
    return [path for path in _entries(folder / GENERATIONS) if generation_of(path) is not None]


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted. Raises IndexFormatError, where a glob would find nothing."""
    with reading(folder):
        return sorted(folder.iterdir())


def _number(path: Path) -> int:
    return generation_of(path) or 0


def _readable(segment: Path) -> Iterator[tuple[Item, bool]]:
    """The items of a damaged segment, as far as they can be read; see `ItemStore.records`."""
    store = ItemStore(segment / ITEMS)
    with suppress(DamagedFileError, TypeError, ValueError):
        store.check_table()
        yield from store.records()


def _row(item: Item, embeddings: FloatArray | None) -> FloatArray | None:
    """(D,) float32, copied; None for a skipped file, and where there is none that an index may hold."""
    if embeddings is None or item.row is None or not 0 <= item.row < len(embeddings):
        return None
    row = np.array(embeddings[item.row])
    return row if is_unit(row[np.newaxis]).all() else None


def _names(folder: Path) -> set[str]:
    """Paths in the index of all that a writer removes once no generation names it."""
    homes = (folder, *(folder / name for name in (GENERATIONS, SEGMENTS, DELETIONS, CACHE)))
    return {path.relative_to(folder).as_posix() for home in homes if home.is_dir() for path in _entries(home)}
