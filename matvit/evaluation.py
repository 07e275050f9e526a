"""The cross-test: how well each query encoder finds what is right in each gallery encoder's index; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from matvit.datasets import GroundTruth, LabelledImages, Pictures, SkippedPicture
from matvit.encoder import ImageEncoder
from matvit.errors import DatasetError
from matvit.metrics import NO_HIT, BoolArray, IntArray
from matvit.near_copies import near_copies
from matvit.progress import Progress, silent
from matvit.quality import Quality, measure
from matvit.relevance import ByClass, ByList, Relevance
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.streaming import EmbeddedPictures, embed_pictures


class Submodels(Protocol):
    """What is measured: `MatViT` is one."""

    @property
    def shape(self) -> EncoderShape:
        """The full encoder's sizes and axes; parses specs."""

    def encoder(self, spec: str | SubmodelSpec | None = None) -> ImageEncoder:
        """The submodel `spec`, ready to embed pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTest:
    """The cross-test matrix, with what was left out of it."""

    queries: str  # names of the data sets; equal for leave-one-out
    gallery: str
    matrix: Mapping[str, Mapping[str, Quality]]  # query spec -> gallery spec -> quality
    reference: tuple[str, str]  # query and gallery spec that differences are taken to
    flops: Mapping[str, int]  # per spec string, one picture; the full encoder's too
    near_copies: int  # queries left out because the gallery holds nearly the same picture
    without_match: int  # queries left out because nothing in the gallery is right for them
    skipped: tuple[SkippedPicture, ...]

    def to_json(self) -> dict[str, Any]:
        """The form that `matvit eval --json` prints."""
        return {
            "queries": self.queries,
            "gallery": self.gallery,
            "matrix": {
                query: {gallery: quality.to_json() for gallery, quality in row.items()}
                for query, row in self.matrix.items()
            },
            "reference": dict(zip(("query", "gallery"), self.reference, strict=True)),
            "flops": dict(self.flops),
            "near_copies": self.near_copies,
            "without_match": self.without_match,
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }


def cross_test(
    submodels: Submodels,
    queries: Pictures,
    gallery: Pictures | None,
    *,
    query_specs: Sequence[str | SubmodelSpec],
    gallery_specs: Sequence[str | SubmodelSpec],
    truth: GroundTruth | None = None,
    drop_near_copies: bool = True,
    recall_at: Sequence[int] = (1, 10),
    limit: int | None = None,
    batch_size: int = 64,
    flops: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> CrossTest:
    """Embeds both data sets with every spec and measures each (query spec, gallery spec) pair.

    Right is what `truth` lists; without it, both data sets are `LabelledImages` and right is every picture of the
    query's class (matched by name). Without a `gallery`, each query searches all other queries (leave-one-out).
    recall@k is measured at 1 and at every k of `recall_at`. `limit` keeps that many queries, evenly spread over the
    data set. Queries are left out, and counted, when the gallery holds a near-copy of them (`drop_near_copies`; not
    in leave-one-out and not where `truth` decides) or nothing that is right. `flops` maps spec strings to the cost
    that the result repeats.

    Every picture is decoded once per resolution, once more where near-copies are looked for, and streamed through
    the encoders, so that only embeddings are kept. Raises SpecError for a spec that the encoder lacks, and DatasetError
    for a `limit` below 1 and when no query is left; pictures that cannot be read are skipped and listed.
    """
    if limit is not None and limit < 1:
        raise DatasetError(
            what=f"a limit of {limit} leaves no query", where=queries.name, fix="give 1 or more, or None for all"
        )
    full = submodels.shape.spec()
    asked = list(dict.fromkeys(submodels.shape.spec(spec) for spec in query_specs))
    indexed = list(dict.fromkeys(submodels.shape.spec(spec) for spec in gallery_specs))
    encoders = {spec: submodels.encoder(spec) for spec in dict.fromkeys([full, *asked, *indexed])}
    searching, indexing = ({spec: encoders[spec] for spec in specs} for specs in ([full, *asked], indexed))
    embed = partial(
        embed_pictures,
        hashing=drop_near_copies and gallery is not None and truth is None,
        batch_size=batch_size,
        progress=progress,
    )
    if gallery is None:
        sides = _among_themselves(queries, limit, embed=embed, searching=searching, indexing=indexing)
    else:
        sides = _against(queries, gallery, limit, embed=embed, searching=searching, indexing=indexing)

    relevance = _relevance(queries, gallery or queries, truth, sides)
    copies = near_copies(sides.queries.hashes, sides.gallery.hashes)
    matched = relevance.relevant > 0
    kept = np.flatnonzero(matched & ~copies)
    if not len(kept):
        raise _no_query(queries.name, copies=copies, matched=matched, unreadable=len(sides.skipped))
    return CrossTest(
        queries=queries.name,
        gallery=(gallery or queries).name,
        matrix=measure(
            relevance.take(kept),
            sides.queries.take(kept).vectors,
            sides.gallery.vectors,
            asked=asked,
            indexed=indexed,
            recall_at=tuple(dict.fromkeys((1, *recall_at))),
            whole_ranking=truth is not None,
        ),
        reference=(str(full), str(indexed[0])),
        flops={str(spec): flops[str(spec)] for spec in encoders if flops and str(spec) in flops},
        near_copies=int(copies.sum()),
        without_match=int((~matched & ~copies).sum()),
        skipped=sides.skipped,
    )


def _no_query(name: str, *, copies: BoolArray, matched: BoolArray, unreadable: int) -> DatasetError:
    return DatasetError(
        what=f"no query is left: {copies.sum()} of {len(copies)} are near-copies of a gallery picture, "
        f"{(~matched).sum()} have no other picture of their class to find, {unreadable} pictures are unreadable",
        where=name,
        fix="give queries and a gallery that show the same classes in different pictures",
    )


# --- embedding ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """Q queries and M gallery pictures, embedded."""

    queries: EmbeddedPictures
    gallery: EmbeddedPictures
    own: IntArray  # (Q,) each query's own row in the gallery, NO_HIT where it is not there
    skipped: tuple[SkippedPicture, ...]


_Encoders = Mapping[SubmodelSpec, ImageEncoder]


def _among_themselves(
    pictures: Pictures,
    limit: int | None,
    *,
    embed: Callable[..., EmbeddedPictures],
    searching: _Encoders,
    indexing: _Encoders,
) -> _Sides:
    """Leave-one-out: all pictures are the gallery, `limit` of them the queries."""
    everything = np.arange(len(pictures))
    if limit is None or limit >= len(pictures):
        found = embed(pictures, everything, encoders={**searching, **indexing}, stage="embed pictures")
        return _Sides(queries=found, gallery=found, own=np.arange(len(found)), skipped=found.skipped)
    found = embed(pictures, everything, encoders=indexing, stage="embed pictures")
    few = found.take(_evenly(len(found), limit)).rows
    asking = embed(pictures, few, encoders=searching, stage="embed queries")  # what searches embeds these alone
    own = np.flatnonzero(np.isin(found.rows, asking.rows))  # a file may be gone by now
    return _Sides(queries=asking, gallery=found, own=own, skipped=found.skipped)


def _against(
    queries: Pictures,
    gallery: Pictures,
    limit: int | None,
    *,
    embed: Callable[..., EmbeddedPictures],
    searching: _Encoders,
    indexing: _Encoders,
) -> _Sides:
    asking = embed(queries, _evenly(len(queries), limit), encoders=searching, stage="embed queries")
    found = embed(gallery, np.arange(len(gallery)), encoders=indexing, stage="embed gallery")
    nowhere = np.full(len(asking), NO_HIT, dtype=np.int64)
    return _Sides(queries=asking, gallery=found, own=nowhere, skipped=asking.skipped + found.skipped)


# --- what is right ------------------------------------------------------------------------------


def _relevance(queries: Pictures, gallery: Pictures, truth: GroundTruth | None, sides: _Sides) -> Relevance:
    query_rows, gallery_rows = sides.queries.rows, sides.gallery.rows
    if truth is not None:
        return ByList.of(truth.positives, truth.junk, queries=query_rows, gallery=gallery_rows, own=sides.own)
    assert isinstance(queries, LabelledImages)
    assert isinstance(gallery, LabelledImages)
    labels = _gallery_labels(queries.labels[query_rows], queries.class_names, gallery.class_names)
    return ByClass(labels=labels, gallery_labels=gallery.labels[gallery_rows], own=sides.own)


def _gallery_labels(labels: IntArray, names: Sequence[str], gallery_names: Sequence[str]) -> IntArray:
    """Labels into `names` -> labels into `gallery_names`, -1 where that class is not in the gallery."""
    position = {name: index for index, name in enumerate(gallery_names)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64)[labels]


def _evenly(count: int, limit: int | None) -> IntArray:
    """`limit` (None: all) of `count` positions, evenly spread: a sorted data set keeps all its classes."""
    return np.linspace(0, count - 1, count if limit is None else min(count, limit)).round().astype(np.int64)
