"""Exact search of some rows, or by a score threshold: block by block, for any vectors that can be read back."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from retrieval.flat import BLOCK, ScoreArray, best_of, sweep

Found = tuple[IntArray, ScoreArray]
"""Positions (K,) int64 and scores (K,) float64, best first; equal scores ordered by id."""


class Vectors(Protocol):
    """Vectors that are searched: all that the retriever needs of an index backend."""

    def __len__(self) -> int:
        """N."""

    def vectors(self, positions: IntArray) -> FloatArray:
        """(Q,) int64 positions -> (Q, D) float32."""

    def search(self, queries: FloatArray, *, k: int) -> list[Found]:
        """(Q, D) float32 -> what is found for each query, at most min(k, N)."""


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
    parts = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    lowest = -np.inf if min_score is None else min_score
    near = sweep(queries, ((part, vectors.vectors(part)) for part in parts), k=k, lowest=lowest)
    found = best_of(queries, vectors.vectors, *near, ids=ids, k=len(rows) if k is None else k)
    return [(positions[scores >= lowest], scores[scores >= lowest]) for positions, scores in found]
