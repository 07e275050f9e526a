"""Exact search: faiss finds candidates in float32, float64 decides. The only module that imports faiss."""

from __future__ import annotations

from collections.abc import Iterable

import faiss
import numpy as np
import numpy.typing as npt

from matvit.preprocess import FloatArray
from retrieval.items import IntArray

ScoreArray = npt.NDArray[np.float64]

_MARGIN = 16  # candidates beyond k in the first round
_PART = 1024  # candidates that float64 decides on together: they stay in the processor's cache


class FlatSearch:
    """The k best of N vectors by inner product, every one compared; equal scores are ordered by id.

    An answer depends on the vectors and the query alone: not on the order of the vectors, nor on
    the other queries of a batch (faiss alone promises neither).
    """

    def __init__(self, ids: IntArray, vectors: Iterable[FloatArray], *, dim: int) -> None:
        """`ids` is (N,) int64; `vectors` are (N_i, D) float32 parts with N rows in all, about unit length."""
        self._ids = ids
        self._faiss = faiss.IndexFlatIP(dim)
        for part in vectors:
            self._faiss.add(np.ascontiguousarray(part, dtype=np.float32))
        assert self._faiss.ntotal == len(ids)
        # A float32 inner product of unit vectors of width D is off by at most D * 2^-24; twice that, to be sure.
        self._slack = dim * 2.0**-23

    def __len__(self) -> int:
        return len(self._ids)

    def vectors(self, positions: IntArray) -> FloatArray:
        """(Q,) int64 positions -> (Q, D) float32."""
        if not len(positions):
            return np.empty((0, self._faiss.d), dtype=np.float32)
        found: FloatArray = self._faiss.reconstruct_batch(positions)
        return found

    def search(self, queries: FloatArray, *, k: int) -> list[tuple[IntArray, ScoreArray]]:
        """(Q, D) float32, finite -> per query positions (K,) int64 into `ids` and float64 scores (K,), best first.

        K = min(k, N).
        """
        if not np.isfinite(queries).all():  # faiss would answer with anything
            raise ValueError("queries must be finite")
        k = min(k, len(self))
        if k == 0:
            empty = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
            return [empty for _ in queries]
        scores, positions = self._faiss.search(queries, min(len(self), k + _MARGIN))
        return [
            self._decide(query, found, border=float(approximate[-1]), k=k)
            for query, found, approximate in zip(queries, positions, scores, strict=True)
        ]

    def _decide(self, query: FloatArray, positions: IntArray, *, border: float, k: int) -> tuple[IntArray, ScoreArray]:
        """Order candidates exactly. `border`: no vector outside `positions` scored more in float32."""
        found = self._best(query, positions, k=k)
        worst = float(found[1][-1])
        if len(positions) == len(self) or worst > border + self._slack:
            return found
        # Whoever was left out may still tie with the last hit or beat it: look at all that come near.
        _, _, near = self._faiss.range_search(query[np.newaxis], worst - self._slack)
        return self._best(query, near, k=k)

    def _best(self, query: FloatArray, positions: IntArray, *, k: int) -> tuple[IntArray, ScoreArray]:
        parts = (positions[start : start + _PART] for start in range(0, len(positions), _PART))
        scores = np.concatenate([self._exact_scores(query, part) for part in parts])
        best = np.lexsort((self._ids[positions], -scores))[:k]
        return positions[best], scores[best]

    def _exact_scores(self, query: FloatArray, positions: IntArray) -> ScoreArray:
        # Sums along the contiguous axis, so every row is added in the same order and equal rows score the same;
        # a matrix product would depend on where the row lies.
        products = self._faiss.reconstruct_batch(positions) * query.astype(np.float64)
        scores: ScoreArray = products.sum(axis=1)
        return scores
