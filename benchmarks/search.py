"""Search beside its peers, in one run and on one thread: recall, time, memory, and how long an index takes to build.

    python benchmarks/search.py [--sizes 1000,10000,100000] [--kinds exact,hnsw,ivfpq,sq] [--rounds 15]
                                [--duplicates] [--json]

Exact search stands beside bare faiss (IndexFlatIP) and a blocked matrix product with top-k, by numpy and by torch. Its
physical limit is reading the gallery once: its bytes over the speed of a large copy. Every other kind stands beside
bare faiss on the very same index, with the same settings: HNSW as it is, the quantisers re-ranked by IndexRefineFlat.

Times are the processor's (`process_time`): other jobs disturb them less. Ratios are medians over the rounds of a
round's own ratio, with the quartiles. A round's calls come in a random order, and every one has other queries.

The vectors are made up: a mixture of 1,000 clusters in 32 dimensions, laid into 384 with a little noise; the queries
are drawn like them, and are not in the index.
"""

from __future__ import annotations

import os

# Two OpenMP pools that wait for one another measure the scheduler; numpy's BLAS reads this when it is imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from matvit.preprocess import FloatArray
from matvit.progress import silent
from retrieval.backends import EXACT, INDEX_TYPES, KINDS
from retrieval.backends.approximate import ApproximateSearch
from retrieval.backends.build import TURNED, Built, build, build_order, turned
from retrieval.backends.kinds import Kind
from retrieval.backends.rows import MappedRows
from retrieval.duplicates import linked
from retrieval.flat import FlatSearch

DIM, K, BATCH = 384, 10, 32
CLUSTERS, LATENT, NOISE = 1000, 32, 0.05
RECALL_QUERIES = 4000
APART = 83  # queries between two peers of a round: what one has read must not lie in the cache for the next
WAYS = (("single", 1), ("batch", BATCH))
BLOCK = 8192  # vectors of one matrix product

Search = Callable[[FloatArray], npt.NDArray[np.int64]]  # queries (Q, DIM) -> positions (Q, K), best first


def vectors(count: int, seed: int) -> FloatArray:
    """(count, DIM) float32 of unit length; other seeds draw from the same clusters."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(1 + seed)
    centres, laying = fixed.standard_normal((CLUSTERS, LATENT)), fixed.standard_normal((LATENT, DIM)) / LATENT**0.5
    made: FloatArray = np.empty((count, DIM), dtype=np.float32)
    for start in range(0, count, BLOCK):
        rows = made[start : start + BLOCK]
        latent = centres[random.integers(0, CLUSTERS, len(rows))] + 0.6 * random.standard_normal((len(rows), LATENT))
        drawn = latent @ laying + NOISE * random.standard_normal(rows.shape)
        rows[:] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return made


def exact_peers(gallery: FloatArray) -> dict[str, Search]:
    """Exact searches of `gallery` (N, DIM), each with vectors of its own: it finds none that another has just read."""
    ours = FlatSearch(np.arange(len(gallery), dtype=np.int64), [gallery], dim=DIM)
    bare = faiss.IndexFlatIP(DIM)
    bare.add(gallery)
    by_numpy, by_torch = gallery.copy(), torch.from_numpy(gallery.copy())
    return {
        "ours": ours_of(ours),
        "faiss": lambda queries: bare.search(queries, K)[1],
        "numpy": lambda queries: numpy_product(by_numpy, queries),
        "torch": lambda queries: torch_product(by_torch, torch.from_numpy(queries)),
    }


def numpy_product(gallery: FloatArray, queries: FloatArray) -> npt.NDArray[np.int64]:
    """Products of blocks, the best K of each kept, and the best K of those."""
    kept = [np.empty((len(queries), 0), dtype=np.float32)], [np.empty((len(queries), 0), dtype=np.int64)]
    for start in range(0, len(gallery), BLOCK):
        scores = queries @ gallery[start : start + BLOCK].T
        best = np.argpartition(-scores, min(K, scores.shape[1] - 1), axis=1)[:, :K]
        kept[0].append(np.take_along_axis(scores, best, axis=1))
        kept[1].append(best + start)
    scores, positions = np.concatenate(kept[0], axis=1), np.concatenate(kept[1], axis=1)
    return np.take_along_axis(positions, np.argsort(-scores, axis=1)[:, :K], axis=1)


def torch_product(gallery: torch.Tensor, queries: torch.Tensor) -> npt.NDArray[np.int64]:
    """The same with torch."""
    scores, positions = [], []
    for start in range(0, len(gallery), BLOCK):
        block = gallery[start : start + BLOCK]
        best = (queries @ block.T).topk(min(K, len(block)), dim=1)
        scores.append(best.values)
        positions.append(best.indices + start)
    order = torch.cat(scores, dim=1).topk(K, dim=1).indices
    return torch.cat(positions, dim=1).gather(1, order).numpy()  # type: ignore[no-any-return]


def approximate_peers(kind: Kind, built: Built, gallery: FloatArray) -> dict[str, Search]:
    """Ours, and bare faiss on the same index with the same settings."""
    everything = np.arange(len(gallery), dtype=np.int64)
    order = np.concatenate(build_order(len(gallery), built.held_out))
    ours = ApproximateSearch(
        everything,
        MappedRows([(gallery, everything)], dim=DIM),
        index=built.index,
        kind=kind,
        setting=built.setting,
        positions=order,
    )
    index, parameters, held = built.index, kind.searching(built.setting), [gallery[order]]
    if not isinstance(index, faiss.IndexHNSW):  # which compares the vectors themselves
        index = faiss.IndexRefineFlat(index, faiss.swig_ptr(held[0]))
        parameters = faiss.IndexRefineSearchParameters(k_factor=built.setting.depth / K, base_index_params=parameters)
    return {"ours": ours_of(ours), "faiss": lambda queries: order[index.search(queries, K, params=parameters)[1]]}


def ours_of(search: FlatSearch | ApproximateSearch) -> Search:
    """Positions alone."""
    return lambda queries: np.stack([positions for positions, _ in search.search(queries, k=K)])


def timed(searches: dict[str, Callable[[FloatArray], object]], queries: FloatArray, rounds: int) -> dict[str, Any]:
    """Milliseconds of each search for one query and for BATCH of them, in each round, interleaved after a warm-up."""
    times: dict[str, Any] = {}
    for way, count in WAYS:
        taken: dict[str, list[float]] = {name: [] for name in searches}
        for number in range(1 + rounds):
            # What the one before has left in the cache must not always hit the same one.
            for place, name in enumerate(np.random.default_rng(number).permutation(list(searches)).tolist()):
                some = np.ascontiguousarray(np.roll(queries, -number * count - place * APART, axis=0)[:count])
                start = time.process_time()
                searches[name](some)
                taken[name].append(1e3 * (time.process_time() - start))
        times[way] = {
            "ms": statistics.median(taken["ours"][1:]) / count,
            "ratios": {name: quartiles(taken["ours"][1:], own[1:]) for name, own in taken.items() if name != "ours"},
        }
    return times


def quartiles(ours: list[float], theirs: list[float]) -> list[float]:
    """The 25th, 50th and 75th percentile of the ratio of times."""
    return np.percentile(np.divide(ours, theirs), [25, 50, 75]).tolist()  # type: ignore[no-any-return]


def recall(search: Search, queries: FloatArray, truth: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Recall@K, and twice its standard error."""
    found = search(queries)
    each = [len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    return statistics.mean(each), 2 * statistics.stdev(each) / len(each) ** 0.5


def written_bytes(index: Any) -> int:
    """What a faiss index holds, about its memory."""
    sizes: list[int] = []
    faiss.write_index(index, faiss.PyCallbackIOWriter(lambda data: sizes.append(len(data))))
    return sum(sizes)


def measure_kind(
    name: str, gallery: FloatArray, queries: FloatArray, *, exact: Search, rounds: int
) -> dict[str, Any] | None:
    """One approximate kind; None where it does not reach the recall that we ask for."""
    kind, start = KINDS[name], time.process_time()
    built = build(kind, MappedRows([(gallery, np.arange(len(gallery)))], dim=DIM), progress=silent)
    seconds = time.process_time() - start
    if built is None:
        return None
    searches, truth = approximate_peers(kind, built, gallery), exact(queries)
    return {
        "kind": name,
        "seconds": seconds,
        "bytes": written_bytes(built.index),
        "effort": built.setting.effort,
        "depth": built.setting.depth,
        "recall_when_built": built.recall,
        "held_out": built.held_out,
        "recall": {peer: recall(search, queries, truth) for peer, search in searches.items()},
        "recall_turned": recall(searches["ours"], away := turned(queries), exact(away)),
        **timed({**searches, "exact": exact}, queries, rounds),
    }


def measure_duplicates(gallery: FloatArray) -> dict[str, Any]:
    """Near-duplicates at 0.95, with a twentieth of copies: time, beside that of the products alone, and memory."""
    random = np.random.default_rng(2)
    copied = gallery.copy()
    copies, originals = random.integers(0, len(gallery), (2, len(gallery) // 20))
    copied[copies] = gallery[originals]
    search = FlatSearch(np.arange(len(gallery), dtype=np.int64), [copied], dim=DIM)
    pairs, product = len(gallery) ** 2 / 2, gallery[:2048] @ gallery[:2048].T
    start = time.process_time()
    np.matmul(gallery[:2048], gallery[:2048].T, out=product)
    products = (time.process_time() - start) * pairs / product.size
    tracemalloc.start()
    start = time.process_time()
    groups = linked(search, same=(), min_score=0.95)
    seconds, memory = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": seconds, "ratio": seconds / products, "bytes": memory, "groups": len(groups)}


def measure(size: int, kinds: list[str], rounds: int, *, duplicates: bool) -> dict[str, Any]:
    """One gallery size: every kind, one query at a time and in batches."""
    gallery, queries = vectors(size, 0), vectors(RECALL_QUERIES, 1)
    searches = exact_peers(gallery)
    result: dict[str, Any] = {"size": size, "approximate": []}
    if EXACT in kinds:
        result["exact"] = timed({**searches, "copy": lambda _: gallery.copy()}, queries, rounds)
    if duplicates:
        result["duplicates"] = measure_duplicates(gallery)
    exact = searches["ours"]
    del searches
    for name in kinds:
        if name != EXACT and (row := measure_kind(name, gallery, queries, exact=exact, rounds=rounds)):
            result["approximate"].append(row)
    return result


def show_exact(results: list[dict[str, Any]]) -> None:
    """Print the table of exact search."""
    print("| pictures | queries at once | ms a query | of faiss | of numpy | of torch | of one copy |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        for way, count in WAYS:
            row = result["exact"][way]
            print(f"| {result['size']:,} | {count} | {row['ms']:.3f} ", end="")
            print(f"| {_ratios(row, ('faiss', 'numpy', 'torch', 'copy'))} |")


def show_approximate(results: list[dict[str, Any]]) -> None:
    """Print the table of the other kinds."""
    print(
        "\n| pictures | kind | built in s | MB | effort, depth | recall@10 when built | for others | of bare faiss ",
        end="",
    )
    print("| queries at once | ms a query | of bare faiss | of exact |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for result in results:
        for kind in result["approximate"]:
            head = f"| {result['size']:,} | {kind['kind']} | {kind['seconds']:.0f} | {kind['bytes'] / 1e6:.0f} "
            head += f"| {kind['effort']}, {kind['depth']} | {kind['recall_when_built']:.4f} of {kind['held_out']:,} "
            mean, error = kind["recall"]["ours"]
            head += f"| {mean:.4f} ± {error:.4f} | {kind['recall']['faiss'][0]:.4f} "
            for way, count in WAYS:
                print(f"{head}| {count} | {kind[way]['ms']:.3f} | {_ratios(kind[way], ('faiss', 'exact'))} |")
    print(f"\n| pictures | kind | recall@10 for others, turned to a cosine of {TURNED} |\n|---|---|---|")
    for result in results:
        for kind in result["approximate"]:
            mean, error = kind["recall_turned"]
            print(f"| {result['size']:,} | {kind['kind']} | {mean:.4f} ± {error:.4f} |")


def show_duplicates(size: int, found: dict[str, Any]) -> None:
    """Print one line."""
    print(f"\nDuplicates of {size:,}: {found['seconds']:.1f} s, {found['ratio']:.2f} of the products alone, ", end="")
    print(f"{found['bytes'] / 1e6:.0f} MB besides the vectors, {found['groups']} groups")


def show(results: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    if any("exact" in result for result in results):
        show_exact(results)
    if any(result["approximate"] for result in results):
        show_approximate(results)
    for result in results:
        if "duplicates" in result:
            show_duplicates(result["size"], result["duplicates"])


def _ratios(row: dict[str, Any], peers: tuple[str, ...]) -> str:
    found = (row["ratios"][peer] for peer in peers)
    return " | ".join(f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in found)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--kinds", default=",".join(INDEX_TYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--duplicates", action="store_true", help="also: every pair compared")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [name for name in arguments.kinds.split(",") if name]
    results = [
        measure(int(size), kinds, arguments.rounds, duplicates=arguments.duplicates)
        for size in arguments.sizes.split(",")
    ]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
