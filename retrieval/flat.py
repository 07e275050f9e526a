"""Exact search: float32 finds candidates, float64 decides."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import faiss
import numpy as np
import numpy.typing as npt

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.threads import for_queries

ScoreArray = npt.NDArray[np.float64]
Knn = Callable[[FloatArray, int], tuple[FloatArray, IntArray]]
"""Queries (Q, D) and k -> float32 scores and positions (Q, k), best first, equal ones in any order."""

_FEW = 4  # queries that faiss compares one by one as quickly as the memory gives vectors; more make a matrix product
_MARGIN = 8  # candidates beyond k that faiss is asked for
_MOST = 1000  # of which faiss's heap is quick
BLOCK = 4096  # vectors compared at a time: the scores of a batch stay in the processor's cache
_PART = 1024  # candidates that float64 decides on together: they stay there, too


class FlatSearch:
    """The k best of N vectors by inner product, every one compared; equal scores are ordered by id.

    An answer depends on the vectors and the query alone: not on the order of the vectors, nor on
    the other queries of a batch (float32 alone promises neither).
    """

    def __init__(
        self,
        ids: IntArray,
        vectors: Iterable[FloatArray],
        *,
        dim: int,
        elsewhere: Callable[[FloatArray], Knn] | None = None,
    ) -> None:
        """`ids` is (N,) int64; `vectors` are (N_i, D) float32 parts with N rows in all, about unit length.

        `elsewhere`: takes all vectors (N, D) to where queries are compared with them, such as a GPU.
        """
        self._ids = ids
        self._vectors = _aligned(len(ids), dim)
        filled = 0
        for part in vectors:
            self._vectors[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(ids)
        self._slack = float32_slack(dim)
        self._few_queries = _FEW if elsewhere is None else sys.maxsize
        self._knn = elsewhere(self._vectors) if elsewhere else self._knn_here

    def __len__(self) -> int:
        return len(self._ids)

    def vectors(self, positions: IntArray) -> FloatArray:
        """(Q,) int64 positions -> (Q, D) float32."""
        return self._vectors[positions]

    def search(self, queries: FloatArray, *, k: int) -> list[tuple[IntArray, ScoreArray]]:
        """(Q, D) float32, finite -> per query positions (K,) int64 into `ids` and float64 scores (K,), best first.

        K = min(k, N).
        """
        check_finite(queries)
        k = min(k, len(self))
        if k == 0:
            empty = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
            return [empty for _ in queries]
        if len(queries) == 1 and k + _MARGIN <= _MOST:
            return [self._one(queries, k=k)]
        few = len(queries) <= self._few_queries and k + _MARGIN <= _MOST
        rows, positions = self._few(queries, k=k) if few else sweep(queries, self._blocks(), k=k)
        return best_of(queries, self.vectors, rows, positions, ids=self._ids, k=k)

    def _blocks(self) -> Iterator[tuple[IntArray, FloatArray]]:
        positions = np.arange(len(self), dtype=np.int64)
        for start in range(0, len(self), BLOCK):
            yield positions[start : start + BLOCK], self._vectors[start : start + BLOCK]

    def _knn_here(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        found: tuple[FloatArray, IntArray]
        with for_queries(len(queries)):
            found = faiss.knn(queries, self._vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return found

    def _one(self, queries: FloatArray, *, k: int) -> tuple[IntArray, ScoreArray]:
        """What `_few` and `best_of` find, in fewer steps: in a small gallery each of them counts."""
        wanted = min(len(self), k + _MARGIN)
        [scores], [positions] = self._knn(queries, wanted)
        floor = scores[k - 1] - 2 * self._slack
        if scores[-1] < floor:
            positions = positions[: np.count_nonzero(scores >= floor)]
        elif wanted < len(self):
            positions = self._near(queries[0], floor)
        return best_of_one(queries[0], self._vectors[positions], positions, ids=self._ids, k=k)

    def _near(self, query: FloatArray, floor: float) -> IntArray:
        """All that come near the last hit: whoever was left out may still tie with it."""
        return np.flatnonzero(self._vectors @ query >= floor)

    def _few(self, queries: FloatArray, *, k: int) -> tuple[IntArray, IntArray]:
        """What `sweep` finds, quicker for a few queries."""
        wanted = min(len(self), k + _MARGIN)
        scores, found = self._knn(queries, wanted)  # (Q, wanted)
        rows, positions = np.repeat(np.arange(len(queries)), wanted), found.ravel()
        if wanted == len(self):
            return rows, positions
        floors = scores[:, k - 1] - 2 * self._slack  # twice: the difference is rounded to float32
        for row in np.flatnonzero(scores[:, -1] >= floors):
            near = self._near(queries[row], floors[row])
            others = rows != row
            rows = np.concatenate([rows[others], np.full(len(near), row)])
            positions = np.concatenate([positions[others], near])
        return rows, positions


def _aligned(rows: int, dim: int) -> FloatArray:
    """(rows, dim) float32, uninitialised, from the start of a cache line on: it is read a quarter quicker."""
    memory = np.empty(rows * dim * 4 + 63, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    aligned: FloatArray = memory[start : start + rows * dim * 4].view(np.float32).reshape(rows, dim)
    return aligned


def check_finite(queries: FloatArray) -> None:
    """Raises ValueError: faiss would answer with anything."""
    # One product takes half as long as a look at each number; where it overflows, they decide.
    if not math.isfinite(np.vdot(queries, queries)) and not np.isfinite(queries).all():
        raise ValueError("queries must be finite")


def float32_slack(dim: int) -> float:
    """By how much two float32 inner products of about unit vectors may be ordered wrongly.

    Each is off by at most D * 2^-24 in whatever order it is summed; a hundredth more for lengths that are not quite 1.
    """
    return 1.01 * dim * 2.0**-23


def exact_scores(rows: FloatArray, query: FloatArray) -> ScoreArray:
    """(N, D) and (D,) float32 -> (N,) float64 inner products; equal rows score the same wherever they lie."""
    if len(rows) <= _PART:
        return _each(rows, query)
    return np.concatenate([_each(rows[start : start + _PART], query) for start in range(0, len(rows), _PART)])


def _each(rows: FloatArray, queries: FloatArray) -> ScoreArray:
    """(P, D) float32, and as many queries or one (D,) -> (P,) float64 inner products.

    Each is summed in the same order, so equal rows score the same; a matrix product would depend on where a row lies.
    """
    scores: ScoreArray = np.vecdot(rows.astype(np.float64), queries.astype(np.float64))
    return scores


def best_of(
    queries: FloatArray,
    read: Callable[[IntArray], FloatArray],
    rows: IntArray,
    positions: IntArray,
    *,
    ids: IntArray,
    k: int,
) -> list[tuple[IntArray, ScoreArray]]:
    """Of M pairs of a query (`rows`) and a vector (`positions`), both (M,): per query its k best, ties by id.

    Gives positions and float64 scores, best first. `queries` (Q, D), `ids` (N,); `read` gives the vectors at
    (P,) positions, (P, D) float32.
    """
    if len(queries) == 1 and len(positions) <= _PART:
        return [best_of_one(queries[0], read(positions), positions, ids=ids, k=k)]
    scores = np.empty(len(rows), dtype=np.float64)
    for start in range(0, len(rows), _PART):
        part = slice(start, start + _PART)
        scores[part] = _each(read(positions[part]), queries[rows[part]])
    order = np.lexsort((ids[positions], -scores, rows))
    rows, positions, scores = rows[order], positions[order], scores[order]
    starts = np.searchsorted(rows, np.arange(len(queries) + 1))
    best = (slice(start, min(start + k, end)) for start, end in pairwise(starts.tolist()))
    return [(positions[own], scores[own]) for own in best]


def best_of_one(
    query: FloatArray, vectors: FloatArray, positions: IntArray, *, ids: IntArray, k: int
) -> tuple[IntArray, ScoreArray]:
    """`best_of` for one query (D,), in fewer steps; `vectors` (P, D) float32 are those at `positions` (P,)."""
    scores = exact_scores(vectors, query)
    own = np.lexsort((ids[positions], -scores))[:k]
    return positions[own], scores[own]


def sweep(
    queries: FloatArray, blocks: Iterable[tuple[IntArray, FloatArray]], *, k: int | None, lowest: float = -np.inf
) -> tuple[IntArray, IntArray]:
    """All pairs of a query and a vector that may belong to the query's `k` best (None: all), as float32 tells.

    `blocks`: positions (B,) and their vectors (B, D). Scores surely below `lowest` are left out. Gives queries (M,) and
    positions (M,).
    """
    kept = _Candidates(len(queries), k=k, lowest=lowest, slack=float32_slack(queries.shape[1]))
    for positions, vectors in blocks:
        kept.add(queries @ vectors.T, positions)  # (Q, B)
    return kept.pairs()


class _Candidates:
    """What may belong to the k best of each query, while blocks of scores come in."""

    def __init__(self, queries: int, *, k: int | None, lowest: float, slack: float) -> None:
        self._k, self._slack = k, slack
        # (Q,) less than this is none of the k best
        self._floor = _below(np.full(queries, lowest, dtype=np.float32), slack)
        none = np.empty(0, dtype=np.int64)
        # Parts of equal length: query, position and score of each candidate.
        self._parts: list[tuple[IntArray, IntArray, FloatArray]] = [(none, none, np.empty(0, dtype=np.float32))]
        self._count, self._limit = 0, 0

    def add(self, scores: FloatArray, positions: IntArray) -> None:
        """Scores (Q, B) of the vectors at `positions` (B,)."""
        if not self._limit and self._k is not None and len(positions) >= self._k:  # the first block
            self._floor = np.maximum(self._floor, _below(_at_most_kth(scores, k=self._k), self._slack))
            self._limit = 2 * len(scores) * self._k  # a floor that is near already leaves little to prune
        flat = np.flatnonzero(scores >= self._floor[:, np.newaxis])  # in one dimension: twice as quick
        rows, columns = np.divmod(flat, len(positions))
        self._parts.append((rows, positions[columns], scores.ravel()[flat]))
        self._count += len(flat)
        if self._k is not None and self._count > self._limit:
            self._prune(self._k)

    def _prune(self, k: int) -> None:
        """Raise the floors to what is known by now, and drop what lies below."""
        rows, positions, scores = self._joined()
        order = np.lexsort((-scores, rows))
        starts = np.searchsorted(rows[order], np.arange(len(self._floor) + 1))
        full = np.flatnonzero(np.diff(starts) >= k)
        worst = scores[order[starts[full] + k - 1]]
        self._floor[full] = np.maximum(self._floor[full], _below(worst, self._slack))
        near = scores >= self._floor[rows]
        self._parts = [(rows[near], positions[near], scores[near])]
        self._count = int(near.sum())
        self._limit = 2 * self._count + len(self._floor) * k  # grows with ties, so that pruning stays rare

    def _joined(self) -> tuple[IntArray, IntArray, FloatArray]:
        rows, positions, scores = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return rows, positions, scores

    def pairs(self) -> tuple[IntArray, IntArray]:
        """(M,) queries, (M,) positions."""
        if self._k is not None:
            self._prune(self._k)
        return self._joined()[:2]


def _below(scores: FloatArray, slack: float) -> FloatArray:
    """(Q,) float32, at least `slack` lower."""
    lower: FloatArray = np.nextafter((scores - slack).astype(np.float32), np.float32(-np.inf))
    return lower


def _at_most_kth(scores: FloatArray, *, k: int) -> FloatArray:
    """(Q, B) scores, B >= k -> (Q,) a bound that k of them reach, at little cost: the k-th best of B / 16 maxima."""
    groups = max(k, scores.shape[1] // 16)
    folds = scores.shape[1] // groups
    best = scores[:, : folds * groups].reshape(len(scores), folds, groups).max(axis=1)  # (Q, groups)
    kth: FloatArray = np.partition(best, groups - k, axis=1)[:, groups - k]
    return kth
