"""Every check on an index that reading all of it allows, and a sample of its pictures; nothing is repaired."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from matvit.encoder import ElasticEncoder, ImageEncoder, is_unit
from matvit.errors import CheckpointError, MissingExtraError
from matvit.progress import Progress, ProgressEvent, silent
from matvit.regular import read_small
from retrieval.encoders import check_encoder, load_encoder
from retrieval.errors import DamagedFileError, EncoderMismatchError, IndexFormatError, IngestError
from retrieval.files import check_kind, damaged, exhausted, reading, sha256_bytes
from retrieval.items import Item
from retrieval.manifest import (
    ATTEMPTS,
    GENERATIONS,
    LOCK,
    Manifest,
    Pointer,
    copy_of,
    read_current,
    read_manifest,
    read_pointer,
    restless,
)
from retrieval.reembed import embed_again
from retrieval.snapshot import OpenSegment, Snapshot, open_segment
from retrieval.types import VerifyReport

SAMPLE = 8  # pictures, where nobody says how many
SAME_PICTURE = 0.98  # cosine: other runtimes and decoders of the same picture stay above, other encoders far below
_ROWS = 1024  # embeddings looked at together: widened, they take four times their room


def verify_index(
    folder: Path, *, sample: int | None = 0, encoder: ElasticEncoder | None = None, progress: Progress = silent
) -> VerifyReport:
    """Everything that is wrong with the index as it lies on the disk.

    `sample` pictures whose files are what was indexed are embedded once more and compared with what is stored, by
    `encoder`, or the one that built the index. None: SAMPLE, or none where that encoder cannot be had, which is then
    told, but no problem. Raises MissingExtraError without torch, if a number of pictures is asked for, and
    IndexFormatError for what is no damage: no index, a newer format, a file that cannot be read at the moment, a writer
    that never rests.
    """
    try:
        check_kind(folder / LOCK, folder=False)
        for _ in range(ATTEMPTS):
            pointer = read_pointer(folder)
            manifest = read_current(folder, lambda now: read_manifest(folder, now))
            problems = _problems_of(folder, manifest, progress) + list(_copy_problems(folder, pointer))
            try:
                if not problems and sample != 0:
                    return _check_sample(Snapshot.open(folder), size=sample, encoder=encoder, progress=progress)
            except IndexFormatError:
                if read_pointer(folder) == pointer:
                    raise
                continue
            if not problems or read_pointer(folder) == pointer:  # or else a writer removed what it replaced
                return VerifyReport(problems=tuple(problems))
        raise restless(folder)
    except DamagedFileError as error:
        return VerifyReport(problems=(str(error),))


def _check_sample(
    snapshot: Snapshot, *, size: int | None, encoder: ElasticEncoder | None, progress: Progress
) -> VerifyReport:
    """Whether pictures embed to what the index holds for them."""
    entry = snapshot.manifest.encoder
    try:
        elastic = encoder or load_encoder(entry, index=snapshot.folder)
        check_encoder(elastic, entry, index=snapshot.folder)
    except (CheckpointError, EncoderMismatchError, MissingExtraError) as error:
        if size is None and encoder is None:  # another encoder at the source's place says as little as none
            return VerifyReport(problems=(), unsampled=str(error))
        if isinstance(error, MissingExtraError):
            raise
        return VerifyReport(problems=(str(error),), unsampled=str(error))
    try:
        return _compared(
            snapshot, elastic.encoder(entry.spec), size=SAMPLE if size is None else size, progress=progress
        )
    except (IngestError, MissingExtraError) as error:  # a store whose package is not there
        if size is None and not exhausted(error):
            return VerifyReport(problems=(), unsampled=str(error))
        raise


def _compared(snapshot: Snapshot, encoder: ImageEncoder, *, size: int, progress: Progress) -> VerifyReport:
    chosen = list(_sample(snapshot, size))
    again = embed_again((item for _, item in chosen), file_name=snapshot.file_name, encoder=encoder)
    problems, sampled = [], 0
    for done, ((segment, item), found) in enumerate(zip(chosen, again, strict=True), start=1):
        if found.embedding is not None and found.item.content_sha256 == item.content_sha256:
            sampled += 1
            cosine = float(found.embedding @ segment.embeddings()[item.row])
            if not cosine >= SAME_PICTURE:
                problems.append(
                    f"{snapshot.file_name(item.place)}: the encoder gives another embedding than the stored one "
                    f"(cosine {cosine:.3f}); index the pictures again with the encoder that you search with"
                )
        progress(ProgressEvent(stage="sample", done=done, total=len(chosen), unit="pictures"))
    return VerifyReport(problems=tuple(problems), sampled=sampled, unusable=len(chosen) - sampled)


def _sample(snapshot: Snapshot, size: int) -> Iterator[tuple[OpenSegment, Item]]:
    """So many pictures, or all there are, in order: rows of one table are read together."""
    live = [segment.live_rows() for segment in snapshot.segments]
    total, start = sum(map(len, live)), 0
    chosen_numbers = random.Random(snapshot.manifest.generation).sample(range(total), min(size, total))  # noqa: S311
    numbers = np.sort(np.array(chosen_numbers, dtype=np.int64))  # of no picture it would be an array of floats
    for segment, rows in zip(snapshot.segments, live, strict=True):
        first, end = np.searchsorted(numbers, [start, start + len(rows)])
        chosen = set(rows[numbers[first:end] - start].tolist())
        start += len(rows)
        if chosen:
            yield from ((segment, item) for item in segment.items.all() if item.row in chosen)


def _copy_problems(folder: Path, pointer: Pointer) -> Iterator[str]:
    """What is wrong with the manifest's copy; an index that was last written before there were any has none."""
    path = folder / GENERATIONS / copy_of(pointer.name)
    if not path.exists():
        return
    try:
        with reading(path):
            data = read_small(path)
        if sha256_bytes(data) != pointer.sha256:
            raise damaged(path, "is not the copy of what was published")
    except DamagedFileError as error:
        yield str(error)


def _problems_of(folder: Path, manifest: Manifest, progress: Progress) -> list[str]:
    problems: list[str] = []
    live = [np.empty(0, dtype=np.int64)]
    segments: list[OpenSegment] = []
    total = len(manifest.segments)
    for done, entry in enumerate(manifest.segments, start=1):
        try:
            segment = open_segment(folder, manifest, entry)
            problems += segment_problems(segment, manifest)
            segments.append(segment)
            live.append(segment.live_ids())
        except DamagedFileError as error:
            problems.append(str(error))
        progress(ProgressEvent(stage="verify", done=done, total=total, unit="segments", note=_count(problems)))
    problems += _cache_problems(folder, manifest, None if problems else segments)
    ids = np.concatenate(live)
    ids.sort()  # in place: np.unique takes four times the memory
    problems += [f"id {one} belongs to several items" for one in np.unique(ids[1:][ids[1:] == ids[:-1]])]
    return problems


def _cache_problems(folder: Path, manifest: Manifest, segments: Sequence[OpenSegment] | None) -> Iterator[str]:
    """`segments`: all of the generation's, where they are whole: only then can they be searched for."""
    if manifest.approximate is not None:
        from retrieval.backends.cache import check_cache, read_cache  # imports faiss

        try:
            if segments is None:
                read_cache(folder, manifest, manifest.approximate)
            else:
                check_cache(folder, manifest, manifest.approximate, segments)
        except DamagedFileError as error:
            yield str(error)


def segment_problems(segment: OpenSegment, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a segment whose items are what was written. Raises IndexFormatError for its embeddings."""
    name = f"segment {segment.entry.name}"
    embeddings = segment.embeddings()
    bad = sum(int((~is_unit(embeddings[start : start + _ROWS])).sum()) for start in range(0, segment.entry.rows, _ROWS))
    if bad:
        yield f"{name}: {bad} embeddings are not finite or not of unit length"
    found = segment.items.counts()
    if found.items != segment.entry.items:
        yield f"{name}: {found.items} items instead of {segment.entry.items}"
    if found.pictures != segment.entry.rows:
        yield f"{name}: items and embeddings do not agree"
    yield from (f"{name}: items have {what}" for what in segment.items.problems())
    if found.items and not 0 <= found.lowest <= found.highest < manifest.next_id:
        yield f"{name}: items have ids that were never given away"
    if (np.diff(segment.deleted) <= 0).any():
        yield f"{name}: its deletions are not sorted"
    if not np.isin(segment.deleted, segment.all_ids()).all():
        yield f"{name}: its deletions name items that it does not have"


def _count(problems: list[str]) -> str:
    return f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else ""
