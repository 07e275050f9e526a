"""Exact search of some rows, or by a score threshold: block by block, for any vectors that can be read back."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from matvit.preprocess import FloatArray
from retrieval.flat import ScoreArray, best_of, float32_slack
from retrieval.items import IntArray

Found = tuple[IntArray, ScoreArray]
"""Positions (K,) int64 and scores (K,) float64, best first; equal scores ordered by id."""

_BLOCK = 8192  # rows that are multiplied together
_PART = 1024  # rows whose float64 products stay in the processor's cache


class Vectors(Protocol):
    """Vectors that are searched: all that the retriever needs of an index backend."""

    def __len__(self) -> int:
        """N."""

    def vectors(self, positions: IntArray) -> FloatArray:
        """(Q,) int64 positions -> (Q, D) float32."""

    def search(self, queries: FloatArray, *, k: int) -> list[Found]:
        """(Q, D) float32 -> what is found for each query, at most min(k, N)."""


def exact_scores(rows: FloatArray, query: FloatArray) -> ScoreArray:
    """(N, D) and (D,) float32 -> (N,) float64 inner products; equal rows score the same wherever they lie."""
    wide = query.astype(np.float64)
    parts = [(rows[start : start + _PART] * wide).sum(axis=1) for start in range(0, len(rows), _PART)]
    return np.concatenate([np.empty(0, dtype=np.float64), *parts])


def exact_search(
    vectors: Vectors,
    queries: FloatArray,
    *,
    ids: IntArray,
    within: IntArray | None = None,
    k: int | None = None,
    min_score: float | None = None,
) -> list[Found]:
    """The best of the rows `within` (None: all) for each of `queries` (Q, D).

    `k` None: all of them. `min_score`: only those that score as much. `ids` (N,) orders equal scores.
    """
    rows = np.arange(len(vectors), dtype=np.int64) if within is None else within
    slack = float32_slack(queries.shape[1])
    lowest = -np.inf if min_score is None else min_score - slack
    candidates = [_Candidates(k, lowest=lowest, slack=slack) for _ in queries]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        for kept, scores in zip(candidates, queries @ vectors.vectors(block).T, strict=True):
            kept.add(block, scores)
    return [
        _decide(vectors, query, kept.positions, ids=ids, k=k, min_score=min_score)
        for query, kept in zip(queries, candidates, strict=True)
    ]


class _Candidates:
    """Rows that may be among one query's best, as far as float32 can tell."""

    def __init__(self, k: int | None, *, lowest: float, slack: float) -> None:
        self._k = k
        self._lowest = lowest  # who scores less in float32 is out
        self._slack = slack
        self.positions = np.empty(0, dtype=np.int64)
        self._scores = np.empty(0, dtype=np.float32)

    def add(self, positions: IntArray, scores: FloatArray) -> None:
        near = scores >= self._lowest
        self.positions = np.concatenate([self.positions, positions[near]])
        self._scores = np.concatenate([self._scores, scores[near]])
        if self._k is not None and len(self._scores) > self._k:
            kth = float(np.partition(self._scores, -self._k)[-self._k])
            # Twice: numpy rounds the bound to float32 when it compares.
            self._lowest = max(self._lowest, kth - 2 * self._slack)
            kept = self._scores >= self._lowest
            self.positions, self._scores = self.positions[kept], self._scores[kept]


def _decide(
    vectors: Vectors, query: FloatArray, positions: IntArray, *, ids: IntArray, k: int | None, min_score: float | None
) -> Found:
    rows = np.zeros(len(positions), dtype=np.int64)  # all of them with the one query
    most = len(positions) if k is None else k
    [(best, scores)] = best_of(query[np.newaxis], vectors.vectors, rows, positions, ids=ids, k=most)
    enough = scores >= (-np.inf if min_score is None else min_score)
    return best[enough], scores[enough]
