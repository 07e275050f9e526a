"""Approximate search: a faiss index finds candidates, exact scores from the raw embeddings decide."""

from __future__ import annotations

from typing import Any

import numpy as np

from matvit.preprocess import FloatArray
from retrieval.backends.kinds import Kind, Setting
from retrieval.backends.rows import MappedRows
from retrieval.flat import FlatSearch, ScoreArray, best_of, check_finite
from retrieval.items import IntArray

_BLOCK = 65_536  # rows read together when everything has to be compared


class ApproximateSearch:
    """Nearly always the k best of N vectors, with their exact scores; equal scores are ordered by id.

    Vectors that the faiss index does not hold are compared one by one beside it; those that it holds
    but that were deleted are never given.
    """

    def __init__(
        self, ids: IntArray, raw: MappedRows, *, index: Any, kind: Kind, setting: Setting, positions: IntArray
    ) -> None:
        """`ids` (N,) int64, `raw` N rows. `positions` (R,) of the R vectors in `index`; -1 where one was deleted."""
        assert index.ntotal == len(positions)
        self._ids, self._raw = ids, raw
        self._index, self._kind, self._setting = index, kind, setting
        self._positions = positions
        held = np.zeros(len(ids), dtype=bool)
        held[positions[positions >= 0]] = True
        self._new = np.flatnonzero(~held)  # (M,) positions that the index does not hold
        self._beside = FlatSearch(ids[self._new], raw.blocks(self._new, _BLOCK), dim=index.d)

    def __len__(self) -> int:
        return len(self._ids)

    def vectors(self, positions: IntArray) -> FloatArray:
        """(Q,) int64 positions -> (Q, D) float32."""
        return self._raw[positions]

    def search(self, queries: FloatArray, *, k: int) -> list[tuple[IntArray, ScoreArray]]:
        """(Q, D) float32, finite -> per query positions (K,) int64 and float64 scores (K,), best first.

        K = min(k, N).
        """
        check_finite(queries)
        k = min(k, len(self))
        beside = [self._new[found] for found, _ in self._beside.search(queries, k=k)]
        wanted = k - len(beside[0]) if len(queries) else 0  # what the index must give for k hits in all
        depth = self._setting.depth * -(-k // 10)
        found = self._candidates(queries, depth=depth)
        while min(map(len, found), default=wanted) < wanted and depth < len(self._positions):
            depth *= 8  # many were deleted, or k is large
            found = self._candidates(queries, depth=depth)
        rows = np.repeat(np.arange(len(queries)), [len(a) + len(b) for a, b in zip(found, beside, strict=True)])
        none = np.empty(0, dtype=np.int64)
        positions = np.concatenate([none, *(part for pair in zip(found, beside, strict=True) for part in pair)])
        return best_of(queries, self.vectors, rows, positions, ids=self._ids, k=k)

    def _candidates(self, queries: FloatArray, *, depth: int) -> list[IntArray]:
        """Per query, positions of about `depth` vectors near it; all there are when `depth` is as many."""
        if depth >= len(self._positions):
            every = self._positions[self._positions >= 0]
            return [every for _ in queries]
        setting = Setting(effort=self._setting.effort, depth=depth)
        _, rows = self._index.search(queries, depth, params=self._kind.searching(setting))
        # faiss pads with -1 what it did not find; the index's -1 are deleted vectors.
        found = np.where(rows >= 0, self._positions[rows], -1)
        return [own[own >= 0] for own in found]
