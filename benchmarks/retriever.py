"""What `Retriever.search` adds to what it calls, the encoder and the search of the vectors; one query, one thread.

    python benchmarks/retriever.py [--rows 10000] [--rounds 40] [--specs XL,S-d8-r56] [--json]

The query is a bundled photograph's bytes, the encoder the bundled one, the index synthetic. Times are the processor's
(`process_time`), interleaved; ratios are medians over the rounds of a round's own ratio, with the quartiles.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_index import make_index

from matvit import MatViT
from matvit_data import demo_folder
from retrieval import Retriever
from retrieval.encoders import describe

K = 10


def milliseconds(call: Callable[[], object]) -> float:
    """One call's time on the processor."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measure(spec: str, *, model: MatViT, retriever: Retriever, rounds: int) -> dict[str, Any]:
    """One submodel: the retriever's whole call beside its parts."""
    photos = [path.read_bytes() for path in sorted(demo_folder().rglob("*.webp"))[:rounds]]
    encoder, vectors = model.encoder(spec), retriever._gallery.vectors
    times: dict[str, list[float]] = {"retriever": [], "bare": []}
    for number in range(3 + rounds):
        photo = photos[number % len(photos)]
        calls: dict[str, Callable[[], object]] = {
            "retriever": lambda photo=photo: retriever.search(photo, encoder=spec, k=K),  # type: ignore[misc]
            "bare": lambda photo=photo: vectors.search(encoder.embed([photo]), k=K),  # type: ignore[misc]
        }
        for name in sorted(calls, reverse=bool(number % 2)):
            times[name].append(milliseconds(calls[name]))
    ours, bare = times["retriever"][3:], times["bare"][3:]
    return {
        "spec": spec,
        "ms": statistics.median(ours),
        "bare_ms": statistics.median(bare),
        "ratio": np.percentile(np.divide(ours, bare), [25, 50, 75]).tolist(),
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--specs", default="XL,S-d8-r56")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = MatViT.from_pretrained("matvit-small")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        make_index(folder, arguments.rows, encoder=describe(model))
        retriever = Retriever.open(folder, encoder=model)
        rows = [
            measure(spec, model=model, retriever=retriever, rounds=arguments.rounds)
            for spec in arguments.specs.split(",")
        ]
    if arguments.json:
        print(json.dumps({"rows": arguments.rows, "submodels": rows}))
        return
    print(f"{arguments.rows:,} pictures\n\n| encoder | ms of a search | ms of its parts | ratio |\n|---|---|---|---|")
    for row in rows:
        low, middle, high = row["ratio"]
        print(f"| {row['spec']} | {row['ms']:.2f} | {row['bare_ms']:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
