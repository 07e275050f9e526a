"""Which gallery pictures are right for which query: by class, or as a benchmark's ground truth lists them.

Q queries, M gallery pictures, K hits a query. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from matvit.metrics import NO_HIT, BoolArray, IntArray


class Relevance(Protocol):
    """What is right for Q queries among M gallery pictures."""

    @property
    def relevant(self) -> IntArray:
        """(Q,): how many gallery pictures are right."""

    @property
    def excluded(self) -> IntArray:
        """(Q, E): gallery rows that a query must not find, padded with NO_HIT."""

    def right(self, hits: IntArray, *, first: int) -> BoolArray:
        """(B, K) gallery rows found by the queries first..first+B -> (B, K): the hit is right."""

    def take(self, positions: IntArray) -> Relevance:
        """The queries at these positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Right is every picture of the query's class, the query itself excepted."""

    labels: IntArray  # (Q,) in the gallery's numbering; -1: a class that it does not have
    gallery_labels: IntArray  # (M,)
    own: IntArray  # (Q,) the query's own gallery row, or NO_HIT

    @property
    def relevant(self) -> IntArray:
        """(Q,): pictures of the query's class, without the query."""
        ordered = np.sort(self.gallery_labels)
        ends = [np.searchsorted(ordered, self.labels, side=side) for side in ("left", "right")]
        return np.asarray(ends[1] - ends[0] - (self.own != NO_HIT), dtype=np.int64)

    @property
    def excluded(self) -> IntArray:
        """(Q, 1): the query's own row."""
        return self.own[:, None]

    def right(self, hits: IntArray, *, first: int) -> BoolArray:
        """(B, K) hits -> (B, K): of the query's class."""
        labels = self.labels[first : first + len(hits), None]
        return np.asarray((self.gallery_labels[hits] == labels) & (hits != NO_HIT))

    def take(self, positions: IntArray) -> ByClass:
        """The queries at these positions."""
        return ByClass(labels=self.labels[positions], gallery_labels=self.gallery_labels, own=self.own[positions])


@dataclass(frozen=True, slots=True, kw_only=True)
class ByList:
    """Right is what the ground truth lists; junk, and the query itself, is taken out of the ranking."""

    positives: tuple[IntArray, ...]  # Q lists of gallery rows
    junk: tuple[IntArray, ...]  # Q lists, with the query's own row

    @classmethod
    def of(
        cls,
        positives: Sequence[Sequence[int]],
        junk: Sequence[Sequence[int]],
        *,
        queries: IntArray,
        gallery: IntArray,
        own: IntArray,
    ) -> ByList:
        """The ground truth over a whole data set, seen by those `queries` and `gallery` pictures that could be read.

        `own` (Q,): each query's own row in the gallery, or NO_HIT.
        """
        row_of = {int(picture): row for row, picture in enumerate(gallery)}

        def rows(listed: Sequence[int]) -> set[int]:
            return {row_of[picture] for picture in listed if picture in row_of}

        asked = [(int(query), {int(row)} - {NO_HIT}) for query, row in zip(queries, own, strict=True)]
        return cls(
            positives=tuple(_ordered(rows(positives[query]) - itself) for query, itself in asked),
            junk=tuple(_ordered(rows(junk[query]) | itself) for query, itself in asked),
        )

    @property
    def relevant(self) -> IntArray:
        """(Q,): listed pictures."""
        return np.array([len(rows) for rows in self.positives], dtype=np.int64)

    @property
    def excluded(self) -> IntArray:
        """(Q, E): junk."""
        padded = np.full((len(self.junk), max(map(len, self.junk), default=0)), NO_HIT, dtype=np.int64)
        for query, rows in enumerate(self.junk):
            padded[query, : len(rows)] = rows
        return padded

    def right(self, hits: IntArray, *, first: int) -> BoolArray:
        """(B, K) hits -> (B, K): listed as right."""
        listed = self.positives[first : first + len(hits)]
        return np.stack([np.isin(row, rows) for row, rows in zip(hits, listed, strict=True)])

    def take(self, positions: IntArray) -> ByList:
        """The queries at these positions."""
        return ByList(
            positives=tuple(self.positives[position] for position in positions),
            junk=tuple(self.junk[position] for position in positions),
        )


def _ordered(rows: set[int]) -> IntArray:
    return np.array(sorted(rows), dtype=np.int64)
