"""How many threads faiss takes: the one place that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within the block, this thread's calls of faiss take one thread.

    Quantisers learn in many short parallel steps: where another process, or torch, keeps a core busy, two threads
    that wait for one another took twenty times as long as one.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
