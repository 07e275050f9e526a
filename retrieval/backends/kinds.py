"""The kinds of approximate index: how each is made, how wide it may look, what it weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import faiss

_LINKS = 32  # HNSW's M: neighbours of a vector in each layer, twice as many in the lowest
_CONSTRUCTION = 200  # HNSW's efConstruction
_EFFORTS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)  # HNSW's efSearch, of which building chooses one
_ROTATION_STEPS = 4  # OPQ's iterations: of faiss's 50, the later ones change little and take minutes
_PER_LIST = 39  # IVF: fewer vectors a list give faiss's k-means too little to learn from


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How wide one search looks for ten hits."""

    effort: int  # HNSW's efSearch, IVF's nprobe; 1 where there is nothing to choose
    depth: int  # candidates that exact scores decide on


class Kind(Protocol):
    """One kind of approximate index over N vectors of width D."""

    def make(self, rows: int, dim: int) -> Any:
        """An empty faiss index for inner products of N vectors of width D."""

    def parameters(self, rows: int, dim: int) -> dict[str, int]:
        """What it is made with, for the manifest."""

    def settings(self) -> tuple[Setting, ...]:
        """From the quickest to the most thorough."""

    def wider(self, setting: Setting, times: int) -> Setting:
        """For so many times ten hits."""

    def bytes(self, rows: int, dim: int) -> int:
        """About what it takes in memory."""

    def searching(self, setting: Setting) -> Any:
        """Faiss's parameters of one search: the index itself is shared by threads."""


class HNSW:
    """A graph of neighbours: the quickest, at somewhat more than the memory of the vectors; slow to build."""

    def make(self, rows: int, dim: int) -> Any:
        """See `Kind`."""
        del rows
        index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _CONSTRUCTION
        return index

    def parameters(self, rows: int, dim: int) -> dict[str, int]:
        """See `Kind`."""
        del rows, dim
        return {"links": _LINKS, "construction": _CONSTRUCTION}

    def settings(self) -> tuple[Setting, ...]:
        """See `Kind`."""
        return tuple(Setting(effort=effort, depth=16) for effort in _EFFORTS)

    def wider(self, setting: Setting, times: int) -> Setting:
        """See `Kind`. It looks at as many as it is to find, at least."""
        return replace(setting, depth=times * setting.depth)

    def bytes(self, rows: int, dim: int) -> int:
        """See `Kind`."""
        return rows * (4 * dim + 4 * (2 * _LINKS + 2))

    def searching(self, setting: Setting) -> Any:
        """See `Kind`."""
        return faiss.SearchParametersHNSW(efSearch=max(setting.effort, setting.depth))  # type: ignore[attr-defined]


class IvfPq:
    """Rotated (OPQ) half-byte codes in lists, re-ranked exactly: a twelfth of the memory or less."""

    def make(self, rows: int, dim: int) -> Any:
        """See `Kind`."""
        rotation = faiss.OPQMatrix(dim, _codes(dim))
        codes = faiss.ProductQuantizer(dim, _codes(dim), 4)
        rotation.pq = codes
        rotation.niter, rotation.niter_pq_0, rotation.niter_pq = _ROTATION_STEPS, 4, 4
        rotation.max_train_points = 10_000
        coarse = faiss.IndexFlatIP(dim)
        lists = faiss.IndexIVFPQFastScan(coarse, dim, _lists(rows), _codes(dim), 4, faiss.METRIC_INNER_PRODUCT)
        lists.cp.min_points_per_centroid = lists.pq.cp.min_points_per_centroid = codes.cp.min_points_per_centroid = 1
        lists.cp.niter = 10
        index = faiss.IndexPreTransform(rotation, lists)
        # Or Python frees what faiss still uses.
        index.referenced_objects = [rotation, codes, coarse, lists]  # type: ignore[attr-defined]
        return index

    def parameters(self, rows: int, dim: int) -> dict[str, int]:
        """See `Kind`."""
        return {"lists": _lists(rows), "codes": _codes(dim), "bits": 4}

    def settings(self) -> tuple[Setting, ...]:
        """See `Kind`."""
        pairs = ((8, 50), (16, 100), (32, 100), (32, 200), (64, 400), (128, 400), (128, 1000), (256, 2000), (512, 4000))
        return tuple(Setting(effort=lists, depth=depth) for lists, depth in pairs)

    def wider(self, setting: Setting, times: int) -> Setting:
        """See `Kind`. More hits lie in more lists."""
        return Setting(effort=times * setting.effort, depth=times * setting.depth)

    def bytes(self, rows: int, dim: int) -> int:
        """See `Kind`."""
        return rows * (_codes(dim) // 2 + 8) + 4 * dim * (_lists(rows) + dim)

    def searching(self, setting: Setting) -> Any:
        """See `Kind`."""
        lists = faiss.SearchParametersIVF(nprobe=setting.effort)  # type: ignore[call-arg]
        return faiss.SearchParametersPreTransform(index_params=lists)  # type: ignore[call-arg]


class ScalarQuantised:
    """A byte a number, every vector compared, re-ranked exactly: a quarter of the memory."""

    def make(self, rows: int, dim: int) -> Any:
        """See `Kind`."""
        del rows
        return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)

    def parameters(self, rows: int, dim: int) -> dict[str, int]:
        """See `Kind`."""
        del rows, dim
        return {"bits": 8}

    def settings(self) -> tuple[Setting, ...]:
        """See `Kind`."""
        return tuple(Setting(effort=1, depth=depth) for depth in (20, 50, 200))

    def wider(self, setting: Setting, times: int) -> Setting:
        """See `Kind`."""
        return replace(setting, depth=times * setting.depth)

    def bytes(self, rows: int, dim: int) -> int:
        """See `Kind`."""
        return rows * dim

    def searching(self, setting: Setting) -> Any:
        """See `Kind`."""
        del setting


def _codes(dim: int) -> int:
    """Half-byte codes of a vector: one for four numbers, where that comes out even."""
    return dim // next(width for width in (4, 3, 2, 1) if dim % width == 0)


def _lists(rows: int) -> int:
    return max(1, min(round(2 * math.sqrt(rows)), rows // _PER_LIST))
