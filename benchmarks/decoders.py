"""Decoding in threads against decoding in worker processes, each beside the encoder on the same cores.

    python benchmarks/decoders.py [--encoders XL,S-d8-r56] [--pictures 256] [--rounds 5] [--device cuda]
        [--sources 160px,12MP] [--json]

Each round decodes all pictures alone, then decodes and encodes them at the same time, with either kind of worker.
Rates are pictures a second, medians; the core-seconds are those of this process and of its workers.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np

from matvit.preprocess import FloatArray, Preprocessing
from matvit.threads import batches_at_once, limited, threads_of_each, usable_cores

# A worker process imports this file: torch, faiss and the index are imported where they are used, to keep it small.

KINDS: dict[str, Callable[[int], Executor]] = {
    "threads": ThreadPoolExecutor,
    "processes": partial(ProcessPoolExecutor, mp_context=get_context("spawn")),  # torch's threads do not survive a fork
}
Encode = Callable[[FloatArray], FloatArray]
Decode = Callable[[Path], FloatArray]


def decode(preprocessing: Preprocessing, size: int, file: Path) -> FloatArray:
    """One file -> (1, 3, size, size) float32."""
    return preprocessing.batch([file], size=size)


def together(files: Sequence[Path], one: Decode, encode: Encode, decoders: Executor, encoders: Executor) -> None:
    """Decode and encode at the same time, and nothing else."""
    from retrieval.pipeline import BATCH

    batches: list[Future[FloatArray]] = []
    decoded = decoders.map(one, files)
    for _ in range(0, len(files), BATCH):
        batch = list(islice(decoded, BATCH))
        batches.append(encoders.submit(lambda batch=batch: encode(np.concatenate(batch))))
    for future in batches:
        future.result()


def core_seconds() -> float:
    """Of this process and of its workers, so far."""
    total = time.process_time()
    for child in active_children():
        numbers = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    return total


def resident() -> float:
    """MiB of all workers that are processes."""
    pages = [int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) for child in active_children()]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def one_round(kind: str, files: Sequence[Path], one: Decode, encode: Encode) -> dict[str, float]:
    """One kind of worker."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    with KINDS[kind](usable_cores()) as decoders, ThreadPoolExecutor(batches_at_once()) as encoders:
        list(decoders.map(one, files[: usable_cores()]))
        found["start s"] = time.perf_counter() - start
        works: dict[str, Callable[[], object]] = {
            "decode": lambda: list(decoders.map(one, files)),
            "both": lambda: together(files, one, encode, decoders, encoders),
        }
        for name, work in works.items():
            start, cpu = time.perf_counter(), core_seconds()
            work()
            found[f"{name}/s"] = len(files) / (time.perf_counter() - start)
            found[f"{name} core ms"] = 1e3 * (core_seconds() - cpu) / len(files)
        found["workers MiB"] = resident()
    return found


def measure(elastic: Any, spec: str, files: Sequence[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Both kinds with one encoder on one kind of picture."""
    encoder = elastic.encoder(spec)
    one = partial(decode, encoder.preprocessing, encoder.spec.image_size)
    with limited("torch", threads_of_each()):
        every = [{kind: one_round(kind, files, one, encoder.encode) for kind in KINDS} for _ in range(1 + rounds)][
            1:
        ]  # the first warms up
    return {
        kind: {name: statistics.median(found[kind][name] for found in every) for name in every[0][kind]}
        for kind in KINDS
    }


def main() -> None:
    """Parse arguments, measure, print."""
    from ingest import measure_all, options

    arguments = options(__doc__).parse_args()
    rows = [
        {"pictures": source, "encoder": spec, "workers": kind, **found}
        for source, spec, kinds in measure_all(arguments, measure)
        for kind, found in kinds.items()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()) + " |")


if __name__ == "__main__":
    main()
