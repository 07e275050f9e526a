"""The index: a folder that pictures are put into, and that retrievers search."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from operator import index
from pathlib import Path
from typing import SupportsIndex, cast

from matvit.durable import TEMPORARY
from matvit.encoder import ElasticEncoder, ImageEncoder
from matvit.errors import MatVitError
from matvit.progress import Progress, ProgressEvent, silent
from retrieval.arguments import is_number, is_whole
from retrieval.encoders import check_encoder, describe, load_encoder, moved_encoder
from retrieval.errors import DamagedFileError, DiskRefusalError, IndexExistsError, IndexFormatError, IngestError
from retrieval.files import index_folder, keeping_lists, remove, remove_temporaries, writing
from retrieval.found_files import FoundFiles
from retrieval.ingest import Ingest
from retrieval.known import KnownItems
from retrieval.locations import absolute, is_url, location
from retrieval.lock import writer_lock
from retrieval.manifest import (
    CURRENT,
    DELETIONS,
    GENERATIONS,
    LOCK,
    OWN,
    SEGMENTS,
    Manifest,
    copy_of,
    is_index,
    make_folders,
    manifest_name,
    publish_manifest,
    read_pointer,
    remove_unpublished,
)
from retrieval.metadata import fields, from_json
from retrieval.repair import repair_index
from retrieval.snapshot import Snapshot
from retrieval.sources import Images, find_files
from retrieval.types import (
    CompactReport,
    IndexInfo,
    IngestReport,
    MetadataField,
    RepairReport,
    UpgradeReport,
    VerifyReport,
)
from retrieval.upgrade import Upgrade, remove_adopted
from retrieval.verify import verify_index
from retrieval.writer import GenerationWriter

Selected = int | str | os.PathLike[str]
"""A picture's id, its file, or a folder around it."""

_HOMES = (GENERATIONS, SEGMENTS, DELETIONS)  # the folders that a creation makes
_NAMED = 5  # of what an index does not hold, in the error


class Index:
    """An index folder, as of the generation that was opened or last written by this object.

    Make one with `Index.create`, `Index.build` or `Index.open`.
    """

    def __init__(self, snapshot: Snapshot, *, encoder: ElasticEncoder | None) -> None:
        self._snapshot = snapshot
        self._encoder = encoder

    def __repr__(self) -> str:
        return f"<Index {self.path}: {self._snapshot}>"

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, encoder: ElasticEncoder) -> Index:
        """A new, empty index for pictures embedded by all of `encoder`; missing parent folders are made.

        Raises IndexExistsError when something is there already, IngestError when it cannot be written.
        """
        folder, described = index_folder(path), describe(encoder)  # raises before anything is made
        with writing(folder):
            try:
                _check_free(folder)
            except (IndexFormatError, FileNotFoundError):  # or another process, with the lock, is just removing one
                with writer_lock(folder):
                    _check_free(folder)
        was_there = folder.exists()
        manifest = Manifest(
            generation=1,
            parent=None,
            created=datetime.now(UTC),
            encoder=described,
            roots={},
            segments=(),
            deletions={},
            next_id=0,
        )
        with ExitStack() as held:
            try:
                with writing(folder):
                    make_folders(folder)
                held.enter_context(writer_lock(folder))
                _check_free(folder)  # another process may have been faster
                with writing(folder):
                    make_folders(folder)  # or have just removed them, with an index of its own
                    _publish_first(folder, manifest)
            except DiskRefusalError:
                _discard_unmade(folder, keep_folder=was_there)
                raise
        return cls(Snapshot.open(folder), encoder=encoder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Index:
        """An existing index: its items are checked against their hashes, its embeddings when they are first used.

        Raises IndexFormatError.
        """
        return cls(Snapshot.open(index_folder(path)), encoder=None)

    @classmethod
    def build(
        cls,
        images: Images,
        *,
        encoder: ElasticEncoder,
        path: str | os.PathLike[str],
        progress: Progress = silent,
    ) -> Index:
        """`create` and `ingest` in one; nothing stays when no picture could be indexed. Raises what they raise."""
        index, _ = build_index(images, encoder=encoder, path=path, progress=progress)
        return index

    @property
    def path(self) -> Path:
        """The index's folder, absolute."""
        return self._snapshot.folder

    @property
    def generation(self) -> int:
        """Number of the published state that this object shows."""
        return self._snapshot.manifest.generation

    def ingest(
        self,
        images: Images | FoundFiles,
        *,
        encoder: ElasticEncoder | None = None,
        delete: bool = False,
        index_type: str | None = None,
        max_ram: int | None = None,
        progress: Progress = silent,
    ) -> IngestReport:
        """Bring the index up to date with `images`: a folder, a file, a pattern, a list, a shard, a URL, or several.

        docs/guides/indexing.md describes lists, shards and URLs.

        Files that the index holds with the same size and time, or the same content, are not embedded again.
        Files that cannot be used are skipped and listed. With `delete`, pictures whose file is gone from the named
        folders, or that were named themselves, are forgotten. Where nothing of a named folder is there, or of the
        folder around a named picture, or where a folder below a named one is now empty, a disk may be away: they stay,
        that place is listed as skipped, and `Index.delete` forgets what was there. Pictures found again elsewhere, by
        their content, keep their id.
        `encoder` None: the one that built the index, which is loaded when a picture must be read. `index_type`, with
        `max_ram`: as for `set_search`, so that a type that is left is not built once more; None: as it is.

        Publishes as it goes, so an interrupted run continues where it stopped when it is repeated;
        KeyboardInterrupt is raised again after publishing what is complete.
        Raises IngestError (nothing to index, or the disk refuses), IndexLockedError, EncoderMismatchError,
        CheckpointError.
        """
        limit = None if index_type is None else _check_search(index_type, max_ram)
        found = find_files(images, delete=delete)
        return self._ingest(
            found, encoder=encoder, delete=delete, index_type=index_type, max_ram=limit, progress=progress
        )

    def delete(self, items: Selected | Iterable[Selected]) -> int:
        """Forget pictures and skipped files by id, by file, or by a folder around them, one or several; gives how many.

        Durable when it returns, and at once for whoever opens the index or reloads. Files are not touched: an
        ingest that finds one again indexes it again, with a new id.
        Raises IngestError, and forgets nothing, when the index holds nothing of that id or path (an absolute path,
        one relative to the working directory, or a URL), or cannot be written; IndexLockedError.
        """
        with keeping_lists(), self._writing() as writer:
            deleted = items_of(self._snapshot, items)
            count = sum(map(len, deleted.values()))
            if count:
                manifest = writer.manifest
                writer.publish([], deleted=deleted, roots=manifest.roots, next_id=manifest.next_id)
        return count

    def compact(self, *, progress: Progress = silent) -> CompactReport:
        """Drop the rows of deleted and replaced pictures, and make few large segments of many small ones.

        Nothing else changes: every picture keeps its id. What is replaced is removed from the disk; readers that
        are open have what they need in memory, or mapped. A kill at any moment leaves a whole index: run it again.
        Raises IngestError, IndexFormatError or IndexLockedError.
        """
        with self._writing() as writer:
            before, total = self._snapshot, 0
            for left in writer.compact():
                total = max(total, left)
                progress(ProgressEvent(stage="compact", done=total - left, total=total, unit="segments"))
            if total:
                progress(ProgressEvent(stage="compact", done=total, total=total, unit="segments"))
            _refresh_search(writer, self._snapshot, progress=progress)
            writer.clean()
        return CompactReport(
            segments_before=len(before.segments),
            segments=len(self._snapshot.segments),
            dropped=sum(len(segment.deleted) for segment in before.segments),
            bytes_before=before.bytes,
            bytes=self._snapshot.bytes,
        )

    def upgrade(
        self, encoder: ElasticEncoder, *, drop_missing: bool = False, progress: Progress = silent
    ) -> UpgradeReport:
        """Embed every picture with all of another encoder, and adopt its space in one step; ids stay.

        Until then the index serves as it is. An interrupted run continues where it stopped when it is repeated.
        A picture whose file cannot be read cannot stay: as long as there is one, nothing is adopted, and the report
        lists it. With `drop_missing` it is kept as a skipped file, and indexed again under its id when it is back.
        Where it is the index's own encoder at another place, only that place is noted, and nothing is embedded.
        Raises IngestError (it is the index's own at the same place, or the disk refuses), IndexLockedError.
        """
        with self._writing() as writer:
            if (moved := moved_encoder(encoder, writer.manifest.encoder)) is not None:
                writer.publish_encoder(moved)
                self._encoder = encoder
                return UpgradeReport(embedded=0, resumed=0, missing=(), published=True, seconds=0.0)
            run = Upgrade(self._snapshot, writer=writer, encoder=encoder, progress=progress)
            report = run.run(drop_missing=drop_missing)
            if report.published:
                self._encoder = encoder
                _refresh_search(writer, self._snapshot, progress=progress)
        return report

    @classmethod
    def repair(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: ElasticEncoder | None = None,
        drop_lost: bool = False,
        progress: Progress = silent,
    ) -> RepairReport:
        """Make a damaged index whole: see `retrieval.repair`. `encoder` None: the one that built it, if needed.

        Where something cannot be brought back nothing is changed, and the report lists it; with `drop_lost` the
        rest is published without it. The damaged files are removed only after that.
        Raises IndexFormatError when there is nothing to start from, or a newer format; IngestError, IndexLockedError.
        """
        return repair_index(index_folder(path), encoder=encoder, drop_lost=drop_lost, progress=progress)

    def set_search(
        self, index_type: str = "auto", *, max_ram: int | None = None, progress: Progress = silent
    ) -> IndexInfo:
        """Choose how the index is searched: "exact", "hnsw", "ivfpq", "sq", or "auto" by size and memory.

        `max_ram`: bytes that the searched vectors may take; only "auto" looks at it. An approximate index is measured
        on held-out vectors; if there are fewer than 1,000 of them, or its recall@10 stays under 0.99, the index stays
        exact, in the latter case until a type is asked for again, and `index_reason` says so. Else the wish is kept:
        later ingests and compactions choose again, and build again when a tenth has changed; until then, what is new is
        searched exactly beside it.
        Raises IngestError (an unknown type or limit, or the disk refuses), IndexFormatError or IndexLockedError.
        """
        limit = _check_search(index_type, max_ram)
        with self._writing() as writer:
            _merge_small(writer)  # whatever made it so, building keeps each segment's file open
            _refresh_search(writer, self._snapshot, index_type=index_type, max_ram=limit, progress=progress)
        return self.info()

    def info(self) -> IndexInfo:
        """What this generation holds."""
        return self._snapshot.info()

    def fields(self) -> dict[str, MetadataField]:
        """The metadata of this generation's pictures by name, as `where` finds it: read from every picture.

        Raises IndexFormatError when a writer has removed the generation since, or a file of it is damaged.
        """
        try:
            return fields(
                from_json(picture.metadata, picture.place[1])
                for segment in self._snapshot.segments
                for picture in map(segment.items.pictures().__getitem__, segment.live_rows().tolist())
            )
        except DamagedFileError as error:
            if read_pointer(self.path) == self._snapshot.pointer:
                raise
            raise IndexFormatError(
                what=f"a writer has moved on since generation {self.generation} was opened here, and removed it",
                where=os.fspath(self.path),
                fix="open the index again",
            ) from error

    def verify(self, *, sample: int = 0, progress: Progress = silent) -> list[str]:
        """Read the whole index as it lies on the disk now: one sentence per problem, empty when it is sound.

        And embed `sample` of its pictures once more, to see that the encoder still gives what is stored: how many of
        them have still the file that was indexed, `verify_report` tells.
        Raises IndexFormatError for what is no damage: no index, a newer format, what cannot be read at the moment;
        IngestError when `sample` is no number of pictures.
        """
        return list(self.verify_report(sample=sample, progress=progress).problems)

    def verify_report(self, *, sample: int = 0, progress: Progress = silent) -> VerifyReport:
        """What `verify` finds, and of how many pictures: none is compared where every file is gone or has changed.

        Raises what `verify` raises.
        """
        if not (is_whole(sample) and is_number(sample) and 0 <= sample < 2**62):
            raise IngestError(what=f"{sample!r} is no number of pictures", where="sample", fix="give one from 0 on")
        return verify_index(self.path, sample=sample, encoder=self._encoder, progress=progress)

    def _ingest(
        self,
        found: FoundFiles,
        *,
        encoder: ElasticEncoder | None,
        delete: bool,
        progress: Progress,
        index_type: str | None = None,
        max_ram: int | None = None,
    ) -> IngestReport:
        given = encoder or self._encoder
        with keeping_lists(), self._writing() as writer:
            entry, snapshot = writer.manifest.encoder, self._snapshot
            if given is not None:
                check_encoder(given, entry, index=self.path)
                self._encoder = given

            def gallery_encoder() -> ImageEncoder:
                self._encoder = given or load_encoder(entry, index=self.path)
                return self._encoder.encoder(entry.spec)

            run = Ingest(snapshot, writer=writer, encoder=gallery_encoder, found=found, progress=progress)
            report = run.run(delete=delete)
            _merge_small(writer)
            _refresh_search(writer, snapshot, index_type=index_type, max_ram=max_ram, progress=progress)
        return report

    @contextmanager
    def _writing(self) -> Iterator[GenerationWriter]:
        """Hold the lock, with `self._snapshot` as the disk says: before the block, and after it, also if it fails."""
        with writer_lock(self.path):
            self._snapshot = Snapshot.open(self.path, reuse=self._snapshot)  # others may have written since
            writer = GenerationWriter(self.path, self._snapshot.manifest)
            writer.clean()
            remove_adopted(self.path, writer.manifest)
            try:
                yield writer
            finally:  # a run that fails has published what was complete
                self._snapshot = Snapshot.open(self.path, reuse=self._snapshot)


def items_of(snapshot: Snapshot, wanted: Selected | Iterable[Selected]) -> dict[str, set[int]]:
    """Ids of the wanted items that count, by segment. Raises IngestError for one that selects nothing."""
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str | bytes | os.PathLike)
    listed = cast(Iterable[object], wanted if several else [wanted])
    asked = [_id_or_place(item) for item in listed]
    ids = {item for item in asked if isinstance(item, int)}
    found = {segment.entry.name: ids.intersection(segment.live_ids().tolist()) for segment in snapshot.segments}
    missing: set[int | str] = {*ids.difference(*found.values())}
    places = {item for item in asked if isinstance(item, str)}
    by_links = {place: place if is_url(place) else _through_links(place) for place in places}
    known = KnownItems(snapshot, {*by_links, *by_links.values()})
    for place, real in by_links.items():
        at_place = list(known.at_or_below(place)) or list(known.at_or_below(real))
        for one in at_place:
            found[one.segment.entry.name].add(one.item.id)
        if not at_place:
            missing.add(place)
    if missing:
        raise _not_held([item for item in dict.fromkeys(asked) if item in missing], snapshot.folder)
    return found


def _through_links(place: str) -> str:
    """The same place by the real names of the folders around it."""
    folder, name = os.path.split(place)
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118 - as text, like all places


def _not_held(missing: Sequence[int | str], folder: Path) -> IngestError:
    named = [
        f"item with id {one}" if isinstance(one, int) else f"picture or folder {one!r}" for one in missing[:_NAMED]
    ]
    more = f", nor {len(missing) - _NAMED} more of these" if len(missing) > _NAMED else ""
    return IngestError(
        what=f"holds no {', no '.join(named)}{more}",
        where=os.fspath(folder),
        fix="give ids and paths as a search gives them; nothing was deleted",
    )


def _id_or_place(item: object) -> int | str:
    if isinstance(item, str | os.PathLike) and isinstance(path := os.fspath(item), str) and path:
        place = absolute(location(path))
        if _can_be_named(place):
            return place
        raise IngestError(what=f"no file can have the name {path!r}", where="delete", fix="give ids, files or folders")
    if not is_whole(item):
        raise IngestError(what=f"{item!r} is no id and no path", where="delete", fix="give ids, files or folders")
    return index(cast(SupportsIndex, item))


def _can_be_named(place: str) -> bool:
    """Not with a NUL, or half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(place)
    except UnicodeEncodeError:
        return False


def _check_search(index_type: str, max_ram: int | None) -> int | None:
    """The limit in bytes. Raises IngestError for what is no index type, or no such limit."""
    from retrieval.backends import INDEX_TYPES

    if index_type not in (known := ("auto", *INDEX_TYPES)):
        raise IngestError(
            what=f"'{index_type}' is no index type", where="index_type", fix=f"use one of: {', '.join(known)}"
        )
    if max_ram is not None and not (is_number(max_ram) and 0 <= max_ram < 2**62):
        raise IngestError(what=f"{max_ram!r} is no number of bytes", where="max_ram", fix="give one from 0 on, or None")
    return None if max_ram is None else int(max_ram)


def _merge_small(writer: GenerationWriter) -> None:
    while writer.merge_small():
        writer.clean()  # or a large index would take its space twice


def _refresh_search(
    writer: GenerationWriter,
    before: Snapshot,
    *,
    progress: Progress,
    index_type: str | None = None,
    max_ram: int | None = None,
) -> None:
    if index_type is None and writer.manifest.asked.type == "exact":
        return
    from retrieval.backends.cache import refresh  # imports faiss

    refresh(writer, reuse=before, index_type=index_type, max_ram=max_ram, progress=progress)


def build_index(
    images: Images | FoundFiles, *, encoder: ElasticEncoder, path: str | os.PathLike[str], progress: Progress = silent
) -> tuple[Index, IngestReport]:
    """`Index.build`, with the report too. What a failed or interrupted run has published stays."""
    found = find_files(images)
    was_there = index_folder(path).exists()
    index = Index.create(path, encoder=encoder)
    try:
        report = index._ingest(found, encoder=encoder, delete=False, progress=progress)
        if not report.indexed:
            raise _nothing_indexed(report)
    except BaseException:
        _discard_empty(index.path, keep_folder=was_there)
        raise
    return index, report


def _publish_first(folder: Path, manifest: Manifest) -> None:
    try:
        remove_unpublished(folder, newest=0)  # of a creation that was killed
        publish_manifest(folder, manifest)
    except OSError:
        (folder / CURRENT).unlink(missing_ok=True)  # it is there when only the wait for the disk failed
        raise


def _discard_unmade(folder: Path, *, keep_folder: bool) -> None:
    """Remove what a creation that the disk refused has made, while it holds the lock, if it came so far."""
    with suppress(OSError):
        if not (folder / CURRENT).exists():
            remove_unpublished(folder, newest=0)
            for home in _HOMES:
                with suppress(FileNotFoundError):
                    (folder / home).rmdir()
            (folder / LOCK).unlink(missing_ok=True)  # last: who makes another finds nothing beside it
            if not keep_folder:
                folder.rmdir()


def _nothing_indexed(report: IngestReport) -> IngestError:
    first = report.skipped[0]
    others = f", and {len(report.skipped) - 1} more could not be used either" if len(report.skipped) > 1 else ""
    return IngestError(
        what=f"{first.reason}{others}", where=os.fspath(first.path), fix="name pictures, or folders that hold some"
    )


def _discard_empty(folder: Path, *, keep_folder: bool) -> None:
    """Remove an index that holds no picture, as the disk says now; not one that another process is writing to.

    What others have put beside it meanwhile stays, and so does the folder then.
    """
    with suppress(MatVitError, OSError), writer_lock(folder):
        if Snapshot.open(folder).info().items:
            return
        (folder / CURRENT).unlink()  # first: what a kill from here on leaves never opens
        remove_temporaries(folder)
        for home in _HOMES:
            remove(folder / home)
        (folder / LOCK).unlink()  # last: who makes another finds nothing beside it
        if not keep_folder:
            folder.rmdir()


def _check_free(folder: Path) -> None:
    if is_index(folder):
        read_pointer(folder)  # raises when CURRENT is lost: what it named may be mended
        raise IndexExistsError(
            what="already holds an index",
            where=str(folder),
            fix=f"bring it up to date with Index.open({os.fspath(folder)!r}).ingest(images), or choose another folder",
        )
    if folder.exists() and not folder.is_dir():
        raise IndexExistsError(what="is a file", where=str(folder), fix="choose another name for the index")
    for around in folder.parents:
        if (around / folder.relative_to(around).parts[0]).name in OWN and is_index(around):
            raise IndexExistsError(
                what=f"lies among the files of the index {around}", where=str(folder), fix="choose a folder elsewhere"
            )
    # A creation that was killed left no more than these.
    ours = {
        "": {GENERATIONS, SEGMENTS, DELETIONS, LOCK},
        GENERATIONS: {manifest_name(1), copy_of(manifest_name(1))},
        SEGMENTS: set(),
        DELETIONS: set(),
    }
    found = [(part, path) for part in ours if (folder / part).is_dir() for path in (folder / part).iterdir()]
    linked = any((folder / part).is_symlink() for part in ours if part)
    if linked or any(path.name not in ours[part] and not path.name.startswith(TEMPORARY) for part, path in found):
        raise IndexExistsError(what="holds other files", where=str(folder), fix="choose a new or empty folder")
