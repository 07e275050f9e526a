"""Groups of pictures that are, or look, the same: every pair compared, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent, silent
from retrieval.exact import Vectors
from retrieval.flat import exact_scores, float32_slack

_BLOCK = 2048  # rows a side of the block of scores that is looked at: 16 MB


class _Links:
    """Who is linked to whom: a forest in which the root of each tree is its least position."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int64)

    def join(self, position: int, others: IntArray) -> None:
        roots = np.unique(self.roots(np.append(others, position)))
        self._parent[roots] = roots[0]

    def roots(self, positions: IntArray) -> IntArray:
        roots = self._parent[positions]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[positions] = roots
        return roots


def linked(
    vectors: Vectors, *, same: Iterable[Sequence[int]], min_score: float | None, progress: Progress = silent
) -> list[IntArray]:
    """Groups of two or more positions, each group and their list ascending.

    Linked are the positions of each of `same`, and every two vectors that score at least `min_score` (None: no
    others); a group is all that links reach. Time grows with N^2, memory with N.
    """
    count = len(vectors)
    links = _Links(count)
    for positions in same:
        links.join(positions[0], np.array(positions, dtype=np.int64))
    if min_score is not None:
        starts = range(0, count, _BLOCK)
        for done, start in enumerate(starts, start=1):
            for other in range(start, count, _BLOCK):
                _link_blocks(vectors, links, start, other, min_score=min_score)
            progress(ProgressEvent(stage="compare", done=done, total=len(starts), unit="blocks"))
    roots = links.roots(np.arange(count, dtype=np.int64))
    order = np.argsort(roots, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    return [group for group in groups if len(group) > 1]


def _link_blocks(vectors: Vectors, links: _Links, start: int, other: int, *, min_score: float) -> None:
    count = len(vectors)
    rows = np.arange(start, min(start + _BLOCK, count), dtype=np.int64)
    columns = np.arange(other, min(other + _BLOCK, count), dtype=np.int64)
    left, right = vectors.vectors(rows), vectors.vectors(columns)
    scores = left @ right.T
    slack = float32_slack(left.shape[1])
    near = scores >= min_score - slack
    if start == other:
        near = np.triu(near, 1)
    for row in np.flatnonzero(near.any(axis=1)):
        found = np.flatnonzero(near[row])
        # float32 tells most of them apart; float64 has to decide on those at the border, unless linked anyway.
        sure = scores[row, found] >= min_score + slack
        links.join(int(rows[row]), columns[found[sure]])
        open_ = found[~sure]
        open_ = open_[links.roots(columns[open_]) != links.roots(rows[row : row + 1])]
        links.join(int(rows[row]), columns[_reaching(right, open_, left[row], min_score)])


def _reaching(rows: FloatArray, chosen: IntArray, query: FloatArray, min_score: float) -> IntArray:
    return chosen[exact_scores(rows[chosen], query) >= min_score]
