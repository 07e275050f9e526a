"""The cross-test: how well each query encoder finds what is right in each gallery encoder's index; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from matvit.datasets import GroundTruth, LabelledImages, Pictures
from matvit.encoder import ImageEncoder
from matvit.errors import DatasetError
from matvit.metrics import (
    NO_HIT,
    RECALL,
    BoolArray,
    IntArray,
    Values,
    agreement,
    average_precision,
    bootstrap_intervals,
    interpolated_average_precision,
    recall_at_k,
    top_k,
)
from matvit.near_copies import near_copies
from matvit.preprocess import FloatArray
from matvit.progress import Progress, silent
from matvit.relevance import ByClass, ByList, Relevance
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.streaming import SkippedPicture, embed_pictures

_DEPTH = 100  # hits that are looked at, at least
_BLOCK_HITS = 1 << 22  # hits held at a time


class Submodels(Protocol):
    """What is measured: `MatViT` is one."""

    @property
    def shape(self) -> EncoderShape:
        """The full encoder's sizes and axes; parses specs."""

    def encoder(self, spec: str | SubmodelSpec | None = None) -> ImageEncoder:
        """The submodel `spec`, ready to embed pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over queries, or a difference of two in points (100 x), with its 95 % bootstrap interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one query encoder finds in one gallery."""

    measures: Mapping[str, Estimate]  # means, each 0 to 1: recall@1, recall@10, map@100, map@r, agreement@10, ...
    n_queries: int
    loss: Estimate  # recall@1 of the full encoder in the same gallery minus this one's, points
    difference: Mapping[str, Estimate]  # each measure minus the reference's (full encoder, first gallery), points

    def __getitem__(self, measure: str) -> float:
        """The mean of a measure."""
        return self.measures[measure].value

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types under the names that tables use."""
        return {
            **{name: mean.value for name, mean in self.measures.items()},
            "n_queries": self.n_queries,
            "intervals": {name: [mean.low, mean.high] for name, mean in self.measures.items()},
            "loss": _points(self.loss),
            "difference": {name: _points(found) for name, found in self.difference.items()},
        }


def _points(found: Estimate) -> dict[str, float]:
    return {"points": found.value, "low": found.low, "high": found.high}


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

    Every picture is decoded once per resolution and streamed through the encoders, so that only
    embeddings are kept. Raises SpecError for a spec that the encoder lacks, and DatasetError when no
    query is left; pictures that cannot be read are skipped and listed.
    """
    full = submodels.shape.spec()
    asked = list(dict.fromkeys(submodels.shape.spec(spec) for spec in query_specs))
    indexed = list(dict.fromkeys(submodels.shape.spec(spec) for spec in gallery_specs))
    encoders = {spec: submodels.encoder(spec) for spec in dict.fromkeys([full, *asked, *indexed])}
    embed = partial(
        embed_pictures,
        hashing=drop_near_copies and gallery is not None and truth is None,
        batch_size=batch_size,
        progress=progress,
    )
    searching, indexing = ({spec: encoders[spec] for spec in specs} for specs in ([full, *asked], indexed))
    if gallery is None:
        everything, few = np.arange(len(queries)), limit is not None and limit < len(queries)
        found = embed(queries, everything, encoders=indexing if few else encoders, stage="embed pictures")
        own = _evenly(len(found), limit)  # the queries' own rows in the gallery
        asking, skipped = found.take(own), found.skipped
        if few:  # what searches embeds these alone
            asking = embed(queries, asking.rows, encoders=searching, stage="embed queries")
            own = np.flatnonzero(np.isin(found.rows, asking.rows))  # a file may be gone by now
    else:
        asking = embed(queries, _evenly(len(queries), limit), encoders=searching, stage="embed queries")
        found = embed(gallery, np.arange(len(gallery)), encoders=indexing, stage="embed gallery")
        own = np.full(len(asking), NO_HIT, dtype=np.int64)
        skipped = asking.skipped + found.skipped

    relevance = _relevance(queries, gallery or queries, truth, query_rows=asking.rows, gallery_rows=found.rows, own=own)
    copies = near_copies(asking.hashes, found.hashes)
    matched = relevance.relevant > 0
    kept = np.flatnonzero(matched & ~copies)
    if not len(kept):
        raise _no_query(queries.name, copies=copies, matched=matched, unreadable=len(skipped))
    return CrossTest(
        queries=queries.name,
        gallery=(gallery or queries).name,
        matrix=_matrix(
            relevance.take(kept),
            asking.take(kept).vectors,
            found.vectors,
            asked=asked,
            indexed=indexed,
            search=partial(_search, recall_at=tuple(dict.fromkeys((1, *recall_at))), whole_ranking=truth is not None),
        ),
        reference=(str(full), str(indexed[0])),
        flops={str(spec): flops[str(spec)] for spec in encoders if flops and str(spec) in flops},
        near_copies=int(copies.sum()),
        without_match=int((~matched & ~copies).sum()),
        skipped=skipped,
    )


def _no_query(name: str, *, copies: BoolArray, matched: BoolArray, unreadable: int) -> DatasetError:
    return DatasetError(
        what=f"no query is left: {copies.sum()} of {len(copies)} are near-copies of a gallery picture, "
        f"{(~matched).sum()} have no other picture of their class to find, {unreadable} pictures are unreadable",
        where=name,
        fix="give queries and a gallery that show the same classes in different pictures",
    )


# --- what is right ------------------------------------------------------------------------------


def _relevance(
    queries: Pictures,
    gallery: Pictures,
    truth: GroundTruth | None,
    *,
    query_rows: IntArray,
    gallery_rows: IntArray,
    own: IntArray,
) -> Relevance:
    if truth is not None:
        return ByList.of(truth.positives, truth.junk, queries=query_rows, gallery=gallery_rows)
    assert isinstance(queries, LabelledImages)
    assert isinstance(gallery, LabelledImages)
    labels = _gallery_labels(queries.labels[query_rows], queries.class_names, gallery.class_names)
    return ByClass(labels=labels, gallery_labels=gallery.labels[gallery_rows], own=own)


def _gallery_labels(labels: IntArray, names: Sequence[str], gallery_names: Sequence[str]) -> IntArray:
    """Labels into `names` -> labels into `gallery_names`, -1 where that class is not in the gallery."""
    position = {name: index for index, name in enumerate(gallery_names)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64)[labels]


def _evenly(count: int, limit: int | None) -> IntArray:
    """`limit` (None: all) of `count` positions, evenly spread: a sorted data set keeps all its classes."""
    return np.linspace(0, count - 1, min(count, limit or count)).round().astype(np.int64)


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one encoder found in one gallery, query by query."""

    first_ten: IntArray  # (Q, 10) gallery rows
    values: Mapping[str, Values]  # per measure (Q,)


def _matrix(
    relevance: Relevance,
    queries: Mapping[SubmodelSpec, FloatArray],
    gallery: Mapping[SubmodelSpec, FloatArray],
    *,
    asked: Sequence[SubmodelSpec],
    indexed: Sequence[SubmodelSpec],
    search: Callable[[Relevance, FloatArray, FloatArray], _Found],
) -> dict[str, dict[str, Quality]]:
    full = next(iter(queries)).shape.spec()
    matrix: dict[str, dict[str, Quality]] = {str(query): {} for query in asked}
    reference: _Found | None = None
    for index in indexed:
        best = search(relevance, queries[full], gallery[index])
        reference = reference or best
        for query in asked:
            found = best if query == full else search(relevance, queries[query], gallery[index])
            matrix[str(query)][str(index)] = _quality(found, best, reference)
    return matrix


def _search(
    relevance: Relevance, queries: FloatArray, gallery: FloatArray, *, recall_at: Sequence[int], whole_ranking: bool
) -> _Found:
    """(Q, D), (M, D) -> what is found, measured block by block: whole rankings of all queries would fill the memory."""
    relevant, excluded = relevance.relevant, relevance.excluded
    depth = len(gallery) if whole_ranking else max(_DEPTH, *recall_at, int(relevant.max()))
    first_ten: list[IntArray] = []
    values: list[dict[str, Values]] = []
    step = max(1, _BLOCK_HITS // depth)
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        hits = top_k(queries[block], gallery, depth, exclude=excluded[block])[1]
        right, there = relevance.right(hits, first=start), relevant[block]
        measured = {
            **{f"recall@{k}": recall_at_k(right, k).astype(np.float64) for k in recall_at},
            "map@100": average_precision(right, there, k=_DEPTH),
            "map@r": average_precision(right, there, k=None),
        }
        if whole_ranking:
            measured["map"] = interpolated_average_precision(right, there)
        first_ten.append(hits[:, :10])
        values.append(measured)
    return _Found(
        first_ten=np.concatenate(first_ten),
        values={name: np.concatenate([block[name] for block in values]) for name in values[0]},
    )


def _quality(found: _Found, best: _Found, reference: _Found) -> Quality:
    """Measures of one encoder, beside the full encoder's in the same gallery (`best`) and in the first one."""
    means = {**found.values, "agreement@10": agreement(found.first_ten, best.first_ten)}
    differences = {name: 100.0 * (values - reference.values[name]) for name, values in found.values.items()}
    loss = 100.0 * (best.values[RECALL] - found.values[RECALL])
    estimates = _estimates(np.stack([*means.values(), *differences.values(), loss], axis=1))
    return Quality(
        measures=dict(zip(means, estimates[: len(means)], strict=True)),
        n_queries=len(loss),
        loss=estimates[-1],
        difference=dict(zip(differences, estimates[len(means) : -1], strict=True)),
    )


def _estimates(values: Values) -> list[Estimate]:
    """(Q, C) -> C estimates of the columns' means."""
    return [
        Estimate(value=float(mean), low=float(low), high=float(high))
        for mean, (low, high) in zip(values.mean(axis=0), bootstrap_intervals(values), strict=True)
    ]
