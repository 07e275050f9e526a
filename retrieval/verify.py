"""Every check on an index that reading all of it allows; nothing is repaired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from matvit.progress import Progress, ProgressEvent
from retrieval.encoders import is_unit
from retrieval.errors import IndexFormatError
from retrieval.items import OK
from retrieval.manifest import Manifest, read_current, read_manifest, read_pointer
from retrieval.snapshot import OpenSegment, open_segment

_ROWS = 65_536  # embeddings looked at together


def find_problems(folder: Path, *, progress: Progress) -> list[str]:
    """One sentence for each problem of the index as it lies on the disk; empty when it is sound."""
    try:
        while True:
            pointer = read_pointer(folder)
            problems = _problems_of(folder, read_current(folder, lambda now: read_manifest(folder, now)), progress)
            if not problems or read_pointer(folder) == pointer:  # or else a writer removed what it replaced
                return problems
    except IndexFormatError as error:
        return [str(error)]


def _problems_of(folder: Path, manifest: Manifest, progress: Progress) -> list[str]:
    problems: list[str] = []
    live: Counter[int] = Counter()
    total = len(manifest.segments)
    for done, entry in enumerate(manifest.segments, start=1):
        try:
            segment = open_segment(folder, manifest, entry)
            problems += _segment_problems(segment, manifest)
            live.update(item.id for item in segment.live(segment.items.all()))
        except IndexFormatError as error:
            problems.append(str(error))
        progress(ProgressEvent(stage="verify", done=done, total=total, unit="segments", note=_count(problems)))
    problems += [f"id {number} belongs to {times} items" for number, times in live.items() if times > 1]
    return problems


def _segment_problems(segment: OpenSegment, manifest: Manifest) -> Iterator[str]:
    name = f"segment {segment.entry.name}"
    embeddings = segment.embeddings()
    bad = sum(int((~is_unit(embeddings[start : start + _ROWS])).sum()) for start in range(0, segment.entry.rows, _ROWS))
    if bad:
        yield f"{name}: {bad} embeddings are not finite or not of unit length"
    items = segment.items.all()
    if len(items) != segment.entry.items:
        yield f"{name}: {len(items)} items instead of {segment.entry.items}"
    if sum(item.status == OK for item in items) != segment.entry.rows:
        yield f"{name}: items and embeddings do not agree"
    if any(not 0 <= item.id < manifest.next_id for item in items):
        yield f"{name}: items have ids that were never given away"
    yield from _deletion_problems(segment, {item.id for item in items})


def _deletion_problems(segment: OpenSegment, ids: set[int]) -> Iterator[str]:
    name = f"segment {segment.entry.name}"
    if (np.diff(segment.deleted) <= 0).any():
        yield f"{name}: its deletions are not sorted"
    if not ids.issuperset(segment.deleted.tolist()):
        yield f"{name}: its deletions name items that it does not have"


def _count(problems: list[str]) -> str:
    return f"{len(problems)} problems" if problems else ""
