"""The demo's measurement: one index of the bundled photographs, queried by S, M, L and XL, here and now."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matvit import MatViT
from matvit.metrics import NO_HIT, IntArray, agreement, recall_at_k
from matvit.progress import Progress, ProgressEvent, silent
from matvit_data import DemoPhoto
from retrieval import Retriever

K = 10  # hits that agreement is measured on
_BATCH = 16  # pictures searched with together: a busy machine takes some seconds
_TIMED, _WARM_UP = 30, 3  # queries, one picture at a time
_QUERIES = 224  # at most, evenly spread: the demo is to end within two minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One submodel as a query encoder of the full encoder's index."""

    spec: str
    relative_flops: float  # of XL
    params: int
    ms_per_query: float  # median of single queries: preprocess + encode + search
    recall_at_1: float  # share of the queries whose first hit is of their class
    agreement_at_10: float  # share of XL's first 10 hits also found, mean over the queries

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types under the names that `matvit demo --json` prints."""
        return {
            "spec": self.spec,
            "relative_flops": self.relative_flops,
            "params": self.params,
            "ms_per_query": self.ms_per_query,
            "recall@1": self.recall_at_1,
            "agreement@10": self.agreement_at_10,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTable:
    """The demo's table, smallest submodel first, and what its numbers were measured on."""

    rows: tuple[DemoRow, ...]
    photos: int  # in the index
    queries: int  # photographs of classes that no training saw
    classes: int  # of the queries
    timed: int  # queries of which `ms_per_query` is the median
    runtime: str


def demo_table(
    retriever: Retriever, encoder: MatViT, photos: Sequence[DemoPhoto], *, progress: Progress = silent
) -> DemoTable:
    """Searches the index of `photos` with counted photographs, evenly spread, and every granularity.

    The full encoder's queries are the index's own embeddings. No query may find itself. Of a class with
    a product picture only the shop photographs search; every picture may be found.
    """
    specs = [str(spec) for spec in encoder.shape.granularities()]
    queries = [photo for photo in photos if photo.counted and photo.role == "photo"]
    queries = queries[:: -(-len(queries) // _QUERIES)]
    labels = _labels(photos)
    asked = np.array([labels[photo.file] for photo in queries])
    found: dict[str, tuple[IntArray, IntArray]] = {}
    total = len(specs) * len(queries)
    for number, spec in enumerate(specs):

        def searched(done: int, *, before: int = number * len(queries), spec: str = spec) -> None:
            progress(ProgressEvent(stage="search", done=before + done, total=total, unit="queries", note=spec))

        found[spec] = _search_all(retriever, queries, spec=spec, labels=labels, searched=searched)
    latencies, runtime = _latencies(retriever, queries, specs=specs, progress=progress)
    full_ids = found[specs[-1]][0]
    return DemoTable(
        rows=tuple(
            DemoRow(
                spec=spec,
                relative_flops=encoder.flops(spec) / encoder.flops(),
                params=encoder.num_params(spec),
                ms_per_query=statistics.median(latencies[spec]),
                recall_at_1=float(recall_at_k(found[spec][1] == asked[:, None], 1).mean()),
                agreement_at_10=float(agreement(found[spec][0], full_ids).mean()),
            )
            for spec in specs
        ),
        photos=len(photos),
        queries=len(queries),
        classes=len(set(asked.tolist())),
        timed=len(latencies[specs[-1]]),
        runtime=runtime,
    )


def _labels(photos: Sequence[DemoPhoto]) -> dict[Path, int]:
    """Each photograph's class as a number; classes of different data sets differ, whatever their names."""
    classes = sorted({(photo.data_set, photo.class_name) for photo in photos})
    number = {name: index for index, name in enumerate(classes)}
    return {photo.file: number[photo.data_set, photo.class_name] for photo in photos}


def _search_all(
    retriever: Retriever,
    queries: Sequence[DemoPhoto],
    *,
    spec: str,
    labels: dict[Path, int],
    searched: Callable[[int], None],
) -> tuple[IntArray, IntArray]:
    """Ids and labels of each query's first K hits without the query itself: two arrays (Q, K) int64.

    `searched` is told how many were, every few seconds.
    """
    ids = np.full((len(queries), K), NO_HIT, dtype=np.int64)
    classes = np.full((len(queries), K), NO_HIT, dtype=np.int64)
    stored = {path: item for item, path in retriever.paths().items()} if spec == "XL" else {}
    for start in range(0, len(queries), _BATCH):
        searched(start)
        batch = queries[start : start + _BATCH]
        asked = [stored.get(photo.file, photo.file) for photo in batch]
        answers = retriever.search_many(asked, k=K + 1, encoder=spec)
        for row, (photo, hits) in enumerate(zip(batch, answers, strict=True), start=start):
            others = [hit for hit in hits if hit.path != photo.file][:K]
            ids[row, : len(others)] = [hit.id for hit in others]
            classes[row, : len(others)] = [labels[hit.path] for hit in others]
    searched(len(queries))
    return ids, classes


def _latencies(
    retriever: Retriever, queries: Sequence[DemoPhoto], *, specs: Sequence[str], progress: Progress
) -> tuple[dict[str, list[float]], str]:
    """Milliseconds of single queries by spec, and the runtime.

    The specs take turns, so that none of them meets a busier machine.
    """
    timed = queries[:: max(1, len(queries) // _TIMED)][:_TIMED]
    latencies: dict[str, list[float]] = {spec: [] for spec in specs}
    runtime = ""
    for number, photo in enumerate([*timed[:_WARM_UP], *timed]):
        for spec in specs:
            hits = retriever.search(photo.file, k=K, encoder=spec)
            runtime = hits.runtime
            if number >= _WARM_UP:
                latencies[spec].append(hits.latency_ms.total)
        progress(ProgressEvent(stage="time", done=number + 1, total=_WARM_UP + len(timed), unit="queries"))
    return latencies, runtime
