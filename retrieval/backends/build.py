"""Building an approximate index: it is measured on held-out vectors, and looks wider until its recall is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from matvit.threads import limited
from retrieval.backends.approximate import TEN, ApproximateSearch
from retrieval.backends.kinds import Kind, Setting
from retrieval.backends.rows import MappedRows
from retrieval.exact import Found, exact_search

LEAST_RECALL = 0.99  # of ten hits, at least so many score as much as the tenth nearest
_ERRORS = 2  # standard errors above it: by chance alone, one choice in forty would be under it for other queries
_HELD_OUT = 1000  # queries that recall is measured with, or a tenth: their mean is then known to some 0.002
TURNED = 0.4  # cosine of queries with gallery embeddings of the same pictures; of S-d8-r56 and XL it is about 0.48
_TRAINING = 100_000  # vectors that quantisers learn from, at most
_BLOCK = 8192  # vectors added together


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A faiss index of R vectors in `build_order`, and how it must be searched."""

    index: Any
    parameters: dict[str, int]  # it was made with
    setting: Setting
    recall: float  # recall@10 against exact search, mean over the held-out queries: the lower of both kinds
    held_out: int  # so many


def build_order(rows: int, held_out: int) -> tuple[IntArray, IntArray]:
    """Which of R rows an index holds first, and the held-out ones, which come last: so many, evenly spread.

    The same for equal arguments: an index that lies on the disk is read by this order.
    """
    last = np.unique(np.linspace(0, rows - 1, held_out).astype(np.int64))
    return np.setdiff1d(np.arange(rows), last), last


def build(kind: Kind, raw: MappedRows, *, progress: Progress) -> Built | None:
    """An index of that kind over `raw`, R rows; None when its recall@10 stays under LEAST_RECALL however wide it looks.

    Recall is measured while the held-out vectors are not in it, by them as they are, and by them turned away as queries
    of small submodels are, which come from where no vectors of the index lie; then they are added.
    """
    rest, held_out = build_order(len(raw), max(1, min(_HELD_OUT, len(raw) // 10)))
    queries = raw[held_out]
    index = kind.make(len(rest), queries.shape[1])
    if not index.is_trained:
        sample = np.sort(np.random.default_rng(0).choice(rest, min(len(rest), _TRAINING), replace=False))
        progress(ProgressEvent(stage="train the index", done=0, total=1, unit="quantisers"))
        # Where another process keeps a core busy, two threads wait for each other, and take far longer than one.
        with limited("faiss", 1):
            index.train(raw[sample])
        progress(ProgressEvent(stage="train the index", done=1, total=1, unit="quantisers"))
    done = 0
    for block in raw.blocks(rest, _BLOCK):
        index.add(block)
        done += len(block)
        progress(ProgressEvent(stage="build the index", done=done, total=len(raw), unit="vectors"))
    found = _measure(kind, index, raw, rest, queries)
    if found is None:
        return None
    index.add(queries)
    progress(ProgressEvent(stage="build the index", done=len(raw), total=len(raw), unit="vectors"))
    return Built(
        index=index,
        parameters=kind.parameters(len(rest), index.d),
        setting=found[0],
        recall=found[1],
        held_out=len(held_out),
    )


def _measure(
    kind: Kind, index: Any, raw: MappedRows, rest: IntArray, queries: FloatArray
) -> tuple[Setting, float] | None:
    own, places, truth = raw.subset(rest), np.arange(len(rest), dtype=np.int64), list[Found]()
    both = np.concatenate([queries, turned(queries)])
    for setting in kind.settings():
        search = ApproximateSearch(rest, own, index=index, kind=kind, setting=setting, positions=places)
        truth = truth or exact_search(search, both, ids=rest, k=TEN)  # reads the rows, but keeps none
        recalls = np.array([_recall(*each) for each in zip(search.search(both, k=TEN), truth, strict=True)])
        means, errors = (of(recalls.reshape(2, -1), axis=1) for of in (np.mean, np.std))
        if min(means - _ERRORS * errors / len(queries) ** 0.5) >= LEAST_RECALL:
            return setting, float(min(means))
    return None


def turned(queries: FloatArray) -> FloatArray:
    """(Q, D) float32 of unit length -> the same, each turned to the cosine TURNED in a direction of its own."""
    away = np.random.default_rng(0).standard_normal(queries.shape, dtype=np.float32)
    away -= np.sum(away * queries, axis=1, keepdims=True) * queries
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    found: FloatArray = TURNED * queries + math.sqrt(1 - TURNED**2) * away
    return found


def _recall(answer: Found, truth: Found) -> float:
    """By score: of equal vectors, more than are asked for, any is right."""
    return np.count_nonzero(answer[1] >= truth[1][-1]) / len(truth[1])
