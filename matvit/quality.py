"""What each encoder finds in each gallery, from embeddings and what is right: measures, paired differences; no torch.

Letters in shape comments: Q queries, M gallery pictures, D embedding, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from matvit.metrics import (
    RECALL,
    IntArray,
    Values,
    agreement,
    average_precision,
    bootstrap_intervals,
    interpolated_average_precision,
    recall_at_k,
    top_k,
)
from matvit.preprocess import FloatArray
from matvit.relevance import Relevance
from matvit.spec import SubmodelSpec

_DEPTH = 100  # hits that are looked at, at least
_BLOCK_HITS = 1 << 22  # hits held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over queries, or a difference of two in points (100 x), with its 95 % bootstrap interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one query encoder finds in one gallery."""

    measures: Mapping[str, Estimate]  # means, each 0 to 1: recall@1, recall@10, map@100, map@r, agreement@10, ...
    n_queries: int
    loss: Estimate  # recall@1 of the full encoder in the same gallery minus this one's, points
    difference: Mapping[str, Estimate]  # each measure minus the reference's (full encoder, first gallery), points

    def __getitem__(self, measure: str) -> float:
        """The mean of a measure."""
        return self.measures[measure].value

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types under the names that tables use."""
        return {
            **{name: mean.value for name, mean in self.measures.items()},
            "n_queries": self.n_queries,
            "intervals": {name: [mean.low, mean.high] for name, mean in self.measures.items()},
            "loss": _points(self.loss),
            "difference": {name: _points(found) for name, found in self.difference.items()},
        }


def measure(
    relevance: Relevance,
    queries: Mapping[SubmodelSpec, FloatArray],
    gallery: Mapping[SubmodelSpec, FloatArray],
    *,
    asked: Sequence[SubmodelSpec],
    indexed: Sequence[SubmodelSpec],
    recall_at: Sequence[int],
    whole_ranking: bool,
) -> dict[str, dict[str, Quality]]:
    """Query spec -> gallery spec -> quality, for every pair of `asked` and `indexed`.

    `queries` (Q, D) of all `asked` specs and the full one, `gallery` (M, D) of all `indexed` ones, of unit length.
    `recall_at` begins with 1. `whole_ranking`: all M pictures are ranked, for the measure "map", too.
    """
    full = next(iter(queries)).shape.spec()
    search = partial(_search, relevance, recall_at=recall_at, whole_ranking=whole_ranking)
    matrix: dict[str, dict[str, Quality]] = {str(query): {} for query in asked}
    reference: _Found | None = None
    for index in indexed:
        best = search(queries[full], gallery[index])
        reference = reference or best
        for query in asked:
            found = best if query == full else search(queries[query], gallery[index])
            matrix[str(query)][str(index)] = _quality(found, best, reference)
    return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one encoder found in one gallery, query by query."""

    first_ten: IntArray  # (Q, 10) gallery rows
    values: Mapping[str, Values]  # per measure (Q,)


def _search(
    relevance: Relevance, queries: FloatArray, gallery: FloatArray, *, recall_at: Sequence[int], whole_ranking: bool
) -> _Found:
    """(Q, D), (M, D) -> what is found, measured block by block: whole rankings of all queries would fill the memory."""
    relevant, excluded = relevance.relevant, relevance.excluded
    depth = len(gallery) if whole_ranking else max(_DEPTH, *recall_at, int(relevant.max()))
    first_ten: list[IntArray] = []
    values: list[dict[str, Values]] = []
    step = max(1, _BLOCK_HITS // depth)
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        hits = top_k(queries[block], gallery, depth, exclude=excluded[block])[1]
        right, there = relevance.right(hits, first=start), relevant[block]
        measured = {
            **{f"recall@{k}": recall_at_k(right, k).astype(np.float64) for k in recall_at},
            "map@100": average_precision(right, there, k=_DEPTH),
            "map@r": average_precision(right, there, k=None),
        }
        if whole_ranking:
            measured["map"] = interpolated_average_precision(right, there)
        first_ten.append(hits[:, :10])
        values.append(measured)
    return _Found(
        first_ten=np.concatenate(first_ten),
        values={name: np.concatenate([block[name] for block in values]) for name in values[0]},
    )


def _quality(found: _Found, best: _Found, reference: _Found) -> Quality:
    """Measures of one encoder, beside the full encoder's in the same gallery (`best`) and in the first one."""
    means = {**found.values, "agreement@10": agreement(found.first_ten, best.first_ten)}
    differences = {name: 100.0 * (values - reference.values[name]) for name, values in found.values.items()}
    loss = 100.0 * (best.values[RECALL] - found.values[RECALL])
    estimates = _estimates(np.stack([*means.values(), *differences.values(), loss], axis=1))
    return Quality(
        measures=dict(zip(means, estimates[: len(means)], strict=True)),
        n_queries=len(loss),
        loss=estimates[-1],
        difference=dict(zip(differences, estimates[len(means) : -1], strict=True)),
    )


def _estimates(values: Values) -> list[Estimate]:
    """(Q, C) -> C estimates of the columns' means."""
    return [
        Estimate(value=float(mean), low=float(low), high=float(high))
        for mean, (low, high) in zip(values.mean(axis=0), bootstrap_intervals(values), strict=True)
    ]


def _points(found: Estimate) -> dict[str, float]:
    return {"points": found.value, "low": found.low, "high": found.high}
