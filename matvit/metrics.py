"""Retrieval quality, exact and in plain numpy: top-k search, recall, average precision, agreement.

Q queries, M gallery pictures, D embedding width, K hits a query, E excluded rows a query. Every measure
gives one value per query, so that two encoders can be compared query by query; average them with `.mean()`.
`right` (Q, K) bool says which hits are right, the best hit first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from matvit.preprocess import FloatArray

Values = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

RECALL = "recall@1"  # the measure that submodels are compared by
NO_HIT = -1  # pads rows of hits where the gallery has fewer than k pictures
_BLOCK_SCORES = 1 << 23  # scores held at a time: 32 MB of float32
_BLOCK_DRAWS = 1 << 22  # queries drawn at a time by the bootstrap: 32 MB of int64


def top_k(
    queries: FloatArray, gallery: FloatArray, k: int, *, exclude: IntArray | None = None
) -> tuple[FloatArray, IntArray]:
    """The k gallery rows of highest inner product with each query; equal scores by ascending row.

    queries (Q, D) and gallery (M, D) float32 -> scores (Q, K) float32 and rows (Q, K) int64, with
    K = min(k, M). `exclude` (Q, E) int64 names gallery rows that each query must not find (itself, in
    leave-one-out; NO_HIT for none); a place that no row is left for has the score -inf and the row
    NO_HIT. Raises ValueError for embeddings that are not finite, or do not fit each other.
    """
    _check_embeddings(queries, gallery, k)
    kept = min(k, len(gallery))
    scores = np.empty((len(queries), kept), dtype=np.float32)
    rows = np.empty((len(queries), kept), dtype=np.int64)
    step = max(1, _BLOCK_SCORES // len(gallery))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        similarity = queries[block] @ gallery.T
        if exclude is not None:
            barred = exclude[block]
            query, place = np.nonzero(barred >= 0)
            similarity[query, barred[query, place]] = -np.inf
        rows[block] = _best_rows(similarity, kept)
        scores[block] = np.take_along_axis(similarity, rows[block], axis=1)
    rows[np.isneginf(scores)] = NO_HIT
    return scores, rows


def _check_embeddings(queries: FloatArray, gallery: FloatArray, k: int) -> None:
    if k < 1 or not len(gallery):
        raise ValueError(f"cannot find {k} hits in a gallery of {len(gallery)}")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} are not rows of one width")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ValueError("embeddings hold NaN or infinite values")  # NaN would sort anywhere


def _best_rows(similarity: FloatArray, k: int) -> IntArray:
    """(Q, M) -> (Q, k): columns of the highest scores, ties by ascending column."""
    columns = similarity.shape[1]
    if k >= columns:
        return np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    # A partition is fast but picks any of several equal scores at the border: take all that reach it.
    border = np.partition(similarity, columns - k, axis=1)[:, columns - k, None]
    result = np.empty((len(similarity), k), dtype=np.int64)
    for query, reaching in enumerate(similarity >= border):
        candidates = np.flatnonzero(reaching)
        order = np.argsort(-similarity[query, candidates], kind="stable")
        result[query] = candidates[order[:k]]
    return result


def recall_at_k(right: BoolArray, k: int) -> BoolArray:
    """(Q, K) -> (Q,) bool: one of the first k hits is right."""
    return np.asarray(right[:, :k].any(axis=1))


def average_precision(right: BoolArray, relevant: IntArray, *, k: int | None = 100) -> Values:
    """(Q, K), (Q,) -> (Q,): average precision of the first k hits, 0 to 1.

    The precisions at the right hits are summed and divided by min(k, relevant), where `relevant`
    counts the gallery's pictures that are right for the query. A query with nothing to find has 0.
    Hits need K >= min(k, M) columns, or the value is too low. With k None, each query's k is its own
    `relevant`: mAP@R of "A Metric Learning Reality Check" (Musgrave et al., ECCV 2020, section 2.3).
    """
    most = relevant if k is None else np.minimum(relevant, k)
    width = right.shape[1]
    counted = right & (np.arange(width) < (most[:, None] if k is None else k))
    precision = np.cumsum(right, axis=1) / np.arange(1, width + 1)
    return np.asarray((precision * counted).sum(axis=1) / np.maximum(most, 1), dtype=np.float64)


def interpolated_average_precision(right: BoolArray, relevant: IntArray) -> Values:
    """(Q, K), (Q,) -> (Q,): area under the precision-recall curve by the trapezium rule, 0 to 1.

    What the Oxford and Paris benchmarks call AP: at each right hit, the mean of the precision before
    and after it. The hits must rank the whole gallery. Source: "Revisiting Oxford and Paris" (Radenović
    et al., CVPR 2018), function compute_ap of its evaluation code.
    """
    rank = np.arange(right.shape[1])
    found = np.cumsum(right, axis=1)  # the hit itself included
    before = np.where(rank == 0, 1.0, (found - right) / np.maximum(rank, 1))
    after = found / (rank + 1)
    total = ((before + after) / 2 * right).sum(axis=1)
    return np.asarray(total / np.maximum(relevant, 1), dtype=np.float64)


def agreement(hits: IntArray, reference: IntArray) -> Values:
    """(Q, K), (Q, K) gallery rows -> (Q,): the fraction of the reference's hits that were also found."""
    # Within a row ids are distinct (NO_HIT aside), so that counting equal pairs counts the intersection.
    there = reference != NO_HIT
    found = ((reference[:, :, None] == hits[:, None, :]).any(axis=2) & there).sum(axis=1)
    return np.asarray(found / np.maximum(there.sum(axis=1), 1), dtype=np.float64)


def bootstrap_intervals(values: npt.NDArray[Any], *, seed: int = 0, samples: int = 2000, level: float = 0.95) -> Values:
    """(Q, C) -> (C, 2): low and high end of the percentile bootstrap interval of each column's mean.

    The same queries are drawn for all columns. Raises ValueError without values.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if not count:
        raise ValueError("the mean of no values has no interval")
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK_DRAWS // count)
    means = np.empty((samples, values.shape[1]))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = generator.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means[start : start + rows] = times @ values / count
    tail = (1 - level) / 2
    return np.asarray(np.quantile(means, [tail, 1 - tail], axis=0).T)
