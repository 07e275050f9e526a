"""Exact search beside its peers, in one run: bare faiss, and a numpy matrix product with top-k.

    python benchmarks/search.py [--sizes 1000,10000,100000] [--json]

The physical limit of one query is reading the gallery once: its bytes over the speed of a large copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from retrieval.flat import FlatSearch

DIM, K = 384, 10


def unit_vectors(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(count, DIM) float32 of unit length."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def median_ms(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Interleaved medians after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(size: int, rounds: int) -> dict[str, Any]:
    """One gallery size: milliseconds a query, one at a time and in a batch of 32."""
    gallery, queries = unit_vectors(size, 0), unit_vectors(32, 1)
    ours = FlatSearch(np.arange(size, dtype=np.int64), [gallery], dim=DIM)
    bare = faiss.IndexFlatIP(DIM)
    bare.add(gallery)

    def product(some: np.ndarray[Any, np.dtype[np.float32]]) -> object:
        scores = some @ gallery.T
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        return np.take_along_axis(scores, best, axis=1)

    one = queries[:1]
    single = median_ms(
        {
            "ours": lambda: ours.search(one, k=K),
            "faiss": lambda: bare.search(one, K),
            "numpy": lambda: product(one),
            "copy": gallery.copy,
        },
        rounds,
    )
    batch = median_ms(
        {
            "ours": lambda: ours.search(queries, k=K),
            "faiss": lambda: bare.search(queries, K),
            "numpy": lambda: product(queries),
        },
        rounds,
    )
    return {"size": size, "single_ms": single, "batch_ms": {name: value / 32 for name, value in batch.items()}}


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
    print(
        "| pictures | one query, ms | of faiss | of numpy | of one copy | in a batch of 32, ms | of faiss | of numpy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        single, batch = result["single_ms"], result["batch_ms"]
        ratios = [single["ours"] / single[name] for name in ("faiss", "numpy", "copy")]
        batched = [batch["ours"] / batch[name] for name in ("faiss", "numpy")]
        cells = [f"{result['size']:,}", f"{single['ours']:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{batch['ours']:.2f}", *(f"{ratio:.2f}" for ratio in batched)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
