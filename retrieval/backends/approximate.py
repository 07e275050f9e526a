"""Approximate search: a faiss index finds candidates, exact scores from the raw embeddings decide."""

from __future__ import annotations

from typing import Any

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.threads import for_queries
from retrieval.backends.kinds import Kind, Setting
from retrieval.backends.rows import MappedRows
from retrieval.flat import FlatSearch, ScoreArray, best_of, check_finite, float32_slack

TEN = 10  # hits that `Setting` is chosen for; for more of them, a search looks as many times as wide
_BLOCK = 65_536  # rows read together when everything has to be compared
_MANY = 3  # times k candidates: telling them apart in float32 first is quicker


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
        self._usual = kind.searching(setting)  # making them takes as long as a small search
        held = np.zeros(len(ids), dtype=bool)
        held[positions[positions >= 0]] = True
        self._held = int(held.sum())
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
        if not len(queries):
            return []
        k = min(k, len(self))
        if k == 0:  # every picture was deleted
            return [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)) for _ in queries]
        beside = [self._new[found] for found, _ in self._beside.search(queries, k=k)]
        found = self._candidates(queries, k=k)
        near = [self._near(query, own, k=k) for query, own in zip(queries, found, strict=True)] + beside
        rows = np.repeat(np.tile(np.arange(len(queries)), 2), [len(own) for own in near])
        return best_of(queries, self.vectors, rows, np.concatenate(near), ids=self._ids, k=k)

    def _near(self, query: FloatArray, positions: IntArray, *, k: int) -> IntArray:
        """Those of `positions` that may be among the query's k best, as far as float32 can tell."""
        if len(positions) < _MANY * k:  # float64 can decide on them all
            return positions
        scores = np.concatenate([rows @ query for rows in self._raw.blocks(positions, _BLOCK)])
        kth = float(np.partition(scores, len(scores) - k)[len(scores) - k])
        near: IntArray = positions[scores >= kth - 2 * float32_slack(len(query))]  # twice: numpy rounds it to float32
        return near

    def _candidates(self, queries: FloatArray, *, k: int) -> list[IntArray]:
        """Per query, positions of vectors of the index near it: at least k, if so many count.

        A query looks wider when a quarter of what it found was deleted: recall was measured with `depth` that count.
        """
        wider = -(-k // TEN)
        enough = min(max(k, wider * self._setting.depth * 3 // 4), self._held)
        found = self._nearest(queries, wider)
        while self._looks_at_some(wider) and (short := [row for row, own in enumerate(found) if len(own) < enough]):
            wider *= 8
            for row, own in zip(short, self._nearest(queries[short], wider), strict=True):
                found[row] = own
        return found

    def _looks_at_some(self, wider: int) -> bool:
        return wider * self._setting.depth < len(self._positions)

    def _nearest(self, queries: FloatArray, wider: int) -> list[IntArray]:
        """Per query, positions that count of the vectors near it, `wider` times as far as for ten hits; or of all."""
        if not self._looks_at_some(wider):
            every = self._positions[self._positions >= 0]
            return [every for _ in queries]
        setting = self._kind.wider(self._setting, wider)
        parameters = self._usual if wider == 1 else self._kind.searching(setting)
        with for_queries(len(queries)):
            _, rows = self._index.search(queries, setting.depth, params=parameters)
        # faiss pads with -1 what it did not find; the index's -1 are deleted vectors.
        found = np.where(rows >= 0, self._positions[rows], -1)
        return [own[own >= 0] for own in found]
