"""Embeddings where they lie on the disk, by position: memory-mapped, so that they take no memory of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray


class MappedRows:
    """N rows picked from several (R_i, D) float32 arrays, read when asked for."""

    def __init__(self, parts: Sequence[tuple[FloatArray, IntArray]], *, dim: int) -> None:
        """`parts`: an array, and which of its rows count, in order."""
        self._parts = [(np.asarray(array), rows) for array, rows in parts]  # memmap's own indexing is slower
        self._ends = np.cumsum([len(rows) for _, rows in parts])
        self._dim = dim

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, positions: IntArray) -> FloatArray:
        """(M,) int64 positions -> (M, D) float32."""
        if len(self._parts) == 1:
            [(array, rows)] = self._parts
            only: FloatArray = array[rows[positions]]
            return only
        found: FloatArray = np.empty((len(positions), self._dim), dtype=np.float32)
        owners = np.searchsorted(self._ends, positions, side="right")
        for owner in np.flatnonzero(np.bincount(owners)).tolist():
            array, rows = self._parts[owner]
            own = owners == owner
            found[own] = array[rows[positions[own] - (self._ends[owner] - len(rows))]]
        return found

    def subset(self, positions: IntArray) -> MappedRows:
        """Only the rows at `positions`, ascending."""
        starts = np.concatenate([[0], self._ends])
        borders = np.searchsorted(positions, starts)
        parts = [
            (array, rows[positions[borders[owner] : borders[owner + 1]] - starts[owner]])
            for owner, (array, rows) in enumerate(self._parts)
        ]
        return MappedRows(parts, dim=self._dim)

    def blocks(self, positions: IntArray, size: int) -> Iterator[FloatArray]:
        """The rows at `positions`, at most `size` at a time."""
        return (self[positions[start : start + size]] for start in range(0, len(positions), size))
