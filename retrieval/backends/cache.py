"""The approximate index of an index folder: built and published by the writer, read by retrievers."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np

from matvit.durable import sync_folder, temporary_name
from matvit.metrics import IntArray
from matvit.progress import Progress
from retrieval.backends import EXACT, KINDS
from retrieval.backends.approximate import ApproximateSearch
from retrieval.backends.build import LEAST_RECALL, build, build_order
from retrieval.backends.choice import choose
from retrieval.backends.gpu import gpu_knn, gpu_of
from retrieval.backends.kinds import Setting
from retrieval.backends.rows import MappedRows
from retrieval.errors import IndexFormatError, IndexWarning
from retrieval.files import check_file, check_size, damaged, reading, sha256_bytes, sha256_file, writing
from retrieval.flat import FlatSearch
from retrieval.manifest import CACHE, ApproximateEntry, AskedEntry, IndexType, Manifest, read_pointer
from retrieval.snapshot import OpenSegment, Snapshot, live_embeddings
from retrieval.writer import GenerationWriter

_STALE = 0.1  # so much of what counts may be missing from the approximate index, or be dead in it
_LOOPS = 2**31  # more than any index of ours asks of faiss's reader
_CHECKED = 16  # vectors that are searched for to see that the index is read by its order
_ITSELF = 0.9999  # cosine
_LIMITS = threading.Lock()  # held while faiss reads a file


def open_search(snapshot: Snapshot, ids: IntArray, *, device: str = "cpu") -> FlatSearch | ApproximateSearch:
    """What searches the generation's N live rows, `ids` (N,) in the order of its segments.

    On a GPU, `device` "cuda" or "cuda:1", every vector is compared, whatever the index's type.

    An approximate index that is missing or damaged is not used: every vector is then compared, and an IndexWarning
    says so. Raises IndexFormatError when embeddings are damaged, or a writer has removed what is read; SearchError
    when there is no such device.
    """
    gpu = gpu_of(device)
    manifest = snapshot.manifest
    entry = manifest.approximate if gpu is None else None
    if entry is not None:
        try:
            index = read_cache(snapshot.folder, manifest, entry)
        except IndexFormatError as error:
            if read_pointer(snapshot.folder) != snapshot.pointer:
                raise
            _warn(snapshot.folder, error)
            entry = None
    if entry is None:
        elsewhere = None if gpu is None else partial(gpu_knn, device=gpu)
        # One by one: each is an open file.
        parts = (embeddings[rows] for embeddings, rows in live_embeddings(snapshot.segments))
        return FlatSearch(ids, parts, dim=manifest.encoder.embedding_dim, elsewhere=elsewhere)
    return _search(snapshot.segments, manifest, entry, index=index, ids=ids)


def _search(
    segments: Sequence[OpenSegment], manifest: Manifest, entry: ApproximateEntry, *, index: Any, ids: IntArray
) -> ApproximateSearch:
    return ApproximateSearch(
        ids,
        MappedRows(list(live_embeddings(segments)), dim=manifest.encoder.embedding_dim),
        index=index,
        kind=KINDS[manifest.index_type],
        setting=Setting(effort=entry.effort, depth=entry.depth),
        positions=_positions(segments, entry)[np.concatenate(build_order(entry.rows, entry.held_out))],
    )


def refresh(
    writer: GenerationWriter,
    *,
    progress: Progress,
    index_type: str | None = None,
    max_ram: int | None = None,
    anew: bool = False,
    reuse: Snapshot | None = None,
) -> None:
    """Publish the newest generation with an index of `index_type`, "auto" or a name of INDEX_TYPES.

    None: as was asked before, built `anew`, or where another type is chosen by now, or the cache is missing, of another
    size, or stale; it is read only where a type is asked for. Segments that `reuse`, an earlier generation, has checked
    are not checked again.
    Raises IngestError when the disk refuses, IndexFormatError when embeddings are damaged.
    """
    snapshot = Snapshot.open(writer.folder, reuse=reuse)
    manifest = snapshot.manifest
    before = manifest.asked
    asked, limit = (before.type, before.max_ram) if index_type is None else (index_type, max_ram)
    rows = sum(len(segment.live_rows()) for segment in snapshot.segments)
    chosen, reason = choose(asked, rows, manifest.encoder.embedding_dim, max_ram=limit)
    now = AskedEntry.model_validate({"type": asked, "max_ram": limit, "chosen": chosen})
    was_left = manifest.index_type != chosen  # for its recall: tried again only when it is asked for again
    stale = anew or _is_stale(snapshot, thorough=index_type is not None)
    if now == before and not stale and (index_type is None or not was_left):
        return
    if chosen != EXACT and _is_dead(snapshot):  # or what is built now would be stale at once, and again each time
        for _ in writer.compact():
            pass
        writer.clean()
        snapshot = Snapshot.open(writer.folder, reuse=snapshot)
    entry = None if chosen == EXACT else _build(snapshot, chosen, progress)
    if entry is None and chosen != EXACT:
        chosen, reason = EXACT, f"{chosen} was left: recall@10 stays under {LEAST_RECALL} ({reason})"
    writer.publish_search(cast(IndexType, chosen), reason=reason, asked=now, approximate=entry)


def _build(snapshot: Snapshot, index_type: str, progress: Progress) -> ApproximateEntry | None:
    kind, dim = KINDS[index_type], snapshot.manifest.encoder.embedding_dim
    arrays = [(segment.embeddings(), np.arange(segment.entry.rows)) for segment in snapshot.segments]
    raw = MappedRows(arrays, dim=dim)
    built = build(kind, raw, progress=progress)
    if built is None:
        return None
    names = [segment.entry.name for segment in snapshot.segments]
    with writing(snapshot.folder):
        path, sha256 = _write(built.index, snapshot.folder / CACHE, names)
        size = path.stat().st_size
    return ApproximateEntry(
        file=path.name,
        bytes=size,
        sha256=sha256,
        segments={segment.entry.name: segment.entry.rows for segment in snapshot.segments},
        parameters=built.parameters,
        effort=built.setting.effort,
        depth=built.setting.depth,
        recall_at_10=built.recall,
        held_out=built.held_out,
    )


def _write(index: Any, home: Path, names: list[str]) -> tuple[Path, str]:
    """Write the index over the segments `names` into the folder `home`: its file, and that file's sha256.

    Raises OSError. It goes to the disk in pieces: the index may be as large as the vectors.
    """
    home.mkdir(exist_ok=True)
    sync_folder(home.parent)
    building = temporary_name(home / "building.faiss")
    try:
        with building.open("wb") as file:
            # Given a name, faiss hides what closing the file was refused: the end of it would be missing.
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
            file.flush()
            os.fsync(file.fileno())
        sha256 = sha256_file(building)
        path = home / f"{sha256_bytes(' '.join((*names, sha256)).encode('ascii'))[:16]}.faiss"
        os.replace(building, path)  # noqa: PTH105 - tests inject failures into os
    except BaseException:
        with suppress(OSError):
            building.unlink(missing_ok=True)
        raise
    sync_folder(home)
    return path, sha256


def _is_stale(snapshot: Snapshot, *, thorough: bool) -> bool:
    entry = snapshot.manifest.approximate
    if entry is None:
        return False
    try:
        if thorough:
            read_cache(snapshot.folder, snapshot.manifest, entry)
        else:
            check_size(snapshot.folder / CACHE / entry.file, size=entry.bytes)
    except IndexFormatError:
        return True
    live_rows = {segment.entry.name: len(segment.live_rows()) for segment in snapshot.segments}
    live, held = sum(live_rows.values()), sum(live_rows.get(name, 0) for name in entry.segments)
    return live - held > _STALE * live or entry.rows - held > _STALE * entry.rows


def _is_dead(snapshot: Snapshot) -> bool:
    """Whether more rows than an index may have count no more."""
    rows = sum(segment.entry.rows for segment in snapshot.segments)
    return rows - snapshot.pictures > _STALE * rows


def read_cache(folder: Path, manifest: Manifest, entry: ApproximateEntry) -> Any:
    """The approximate index that a manifest names. Raises IndexFormatError unless it is what the manifest says."""
    path, dim = folder / CACHE / entry.file, manifest.encoder.embedding_dim
    check_file(path, size=entry.bytes, sha256=entry.sha256)  # faiss itself does not notice flipped bits
    try:
        with reading(path), path.open("rb") as file, _reading_at_most(2 * entry.bytes):
            # By its name, which would have to be UTF-8, it would be opened once more.
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise damaged(path, "is no index that this faiss reads") from error
    if index.ntotal != entry.rows or index.d != dim:
        raise damaged(path, f"does not hold {entry.rows} vectors of width {dim}")
    if any(entry.segments.get(segment.name, segment.rows) != segment.rows for segment in manifest.segments):
        raise damaged(path, "does not hold the segments as they are")
    return index


def check_cache(folder: Path, manifest: Manifest, entry: ApproximateEntry, segments: Sequence[OpenSegment]) -> None:
    """Read the approximate index over whole segments, and search for some of the vectors that it held out.

    They come last, so their places tell whether it has the order that the manifest says. Raises IndexFormatError.
    """
    index = read_cache(folder, manifest, entry)
    ids = np.arange(sum(len(segment.live_rows()) for segment in segments))
    search = _search(segments, manifest, entry, index=index, ids=ids)
    _, held_out = build_order(entry.rows, entry.held_out)
    places = _positions(segments, entry)[held_out]
    places = places[places >= 0]
    places = places[np.linspace(0, len(places) - 1, min(_CHECKED, len(places))).astype(np.int64)]
    best = [float(scores[0]) for _, scores in search.search(search.vectors(places), k=1)]
    if sum(score < _ITSELF for score in best) > len(best) / 2:  # one or two are missed by a sound index, too
        raise damaged(folder / CACHE / entry.file, "does not find vectors that it holds in the order of its manifest")


@contextmanager
def _reading_at_most(size: int) -> Iterator[None]:
    """While the block runs, faiss's reader refuses vectors of more than `size` bytes; its limits are the process's."""
    with _LIMITS:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(_LOOPS)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def _warn(folder: Path, error: IndexFormatError) -> None:
    warnings.warn(
        f"{error.where}: {error.what}; every vector is compared instead, right but slower; run: matvit repair {folder}",
        IndexWarning,
        stacklevel=2,
    )


def _positions(segments: Sequence[OpenSegment], entry: ApproximateEntry) -> IntArray:
    """(R,) for each row of the approximate index's segments: its place among the live rows; -1 if it counts no more.

    A segment is named by the hash of what it holds, so one of an equal name has equal rows.
    """
    start, placed = 0, dict[str, IntArray]()
    for segment in segments:
        rows = segment.live_rows()
        places = np.full(segment.entry.rows, -1, dtype=np.int64)
        places[rows] = np.arange(start, start + len(rows))
        placed[segment.entry.name] = places
        start += len(rows)
    merged_away = {name: np.full(rows, -1, dtype=np.int64) for name, rows in entry.segments.items()}
    return np.concatenate([np.empty(0, dtype=np.int64), *((merged_away | placed)[name] for name in entry.segments)])
