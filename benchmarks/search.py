"""Exact search beside its peers, in one run and on one thread: bare faiss, and a numpy matrix product with top-k.

    python benchmarks/search.py [--sizes 1000,10000,100000] [--rounds 15] [--json]

The physical limit of one query is reading the gallery once: its bytes over the speed of a large copy.
Ratios are medians over the rounds of a round's own ratio, with the quartiles.
"""

from __future__ import annotations

import os

# Two OpenMP pools that wait for one another measure the scheduler; numpy's BLAS reads this when it is imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.flat import FlatSearch

DIM, K = 384, 10


def unit_vectors(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(count, DIM) float32 of unit length."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


Search = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]


def peers(gallery: npt.NDArray[np.float32]) -> dict[str, Search]:
    """Searches of `gallery` (N, DIM): queries (Q, DIM) -> positions (Q, K), best first."""
    ours = FlatSearch(np.arange(len(gallery), dtype=np.int64), [gallery], dim=DIM)
    bare = faiss.IndexFlatIP(DIM)
    bare.add(gallery)

    def product(queries: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        scores = queries @ gallery.T
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)

    return {
        "ours": lambda queries: np.stack([positions for positions, _ in ours.search(queries, k=K)]),
        "faiss": lambda queries: bare.search(queries, K)[1],
        "numpy": product,
    }


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, interleaved, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def measure(size: int, rounds: int) -> dict[str, Any]:
    """One gallery size: one query at a time, and a batch of 32."""
    gallery, queries = unit_vectors(size, 0), unit_vectors(32, 1)
    searches = peers(gallery)
    rows: dict[str, Any] = {"size": size}
    for name, some in (("single", queries[:1]), ("batch", queries)):
        calls = {peer: (lambda search=search, some=some: search(some)) for peer, search in searches.items()}
        times = timed({**calls, "copy": gallery.copy}, rounds)
        rows[name] = {
            "ms": statistics.median(times["ours"]) / len(some),
            "ratios": {peer: quartiles(times["ours"], times[peer]) for peer in ("faiss", "numpy", "copy")},
        }
    return rows


def quartiles(ours: list[float], theirs: list[float]) -> list[float]:
    """The 25th, 50th and 75th percentile of the ratio of times."""
    return np.percentile(np.divide(ours, theirs), [25, 50, 75]).tolist()  # type: ignore[no-any-return]


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [measure(int(size), arguments.rounds) for size in arguments.sizes.split(",")]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print("| pictures | queries at once | ms a query | of faiss | of numpy | of one copy |")
    print("|---|---|---|---|---|---|")
    for result in results:
        for name, count in (("single", 1), ("batch", 32)):
            row = result[name]
            ratios = [f"{mid:.2f} ({low:.2f} to {high:.2f})" for low, mid, high in row["ratios"].values()]
            print(f"| {result['size']:,} | {count} | {row['ms']:.2f} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
