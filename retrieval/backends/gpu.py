"""Exact search's comparison on a GPU, through faiss-gpu.

The tests of it run on faiss's CPU functions in their stead where there is no GPU; it has not run on one yet.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import faiss

from matvit.preprocess import FloatArray
from retrieval.errors import SearchError
from retrieval.flat import Knn


def gpu_knn(vectors: FloatArray, *, device: int = 0, resources: Any = None) -> Knn:
    """Copy `vectors` (N, D) float32 to a GPU and compare there. Safe from any thread, one at a time.

    `resources`: faiss's, to share memory among several indexes; None: new ones.
    Raises SearchError when faiss sees no such GPU.
    """
    if device >= (found := faiss.get_num_gpus()):
        raise SearchError(
            what=f"faiss sees {found} GPUs" if found else "faiss sees no GPU",
            where=f"search_device 'cuda:{device}'",
            fix="search on 'cpu', or install faiss-gpu on a machine with one",
        )
    resources = resources or faiss.StandardGpuResources()
    index = faiss.index_cpu_to_gpu(resources, device, faiss.IndexFlatIP(vectors.shape[1]))
    index.add(vectors)
    lock = threading.Lock()  # faiss's GPU resources serve one thread at a time

    def knn(queries: FloatArray, k: int) -> Any:
        with lock:
            return index.search(queries, k)

    return knn


def gpu_of(device: str) -> int | None:
    """The GPU that "cuda" or "cuda:1" names, None for "cpu". Raises SearchError for anything else."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device) if isinstance(device, str) else None
    if match is None:
        raise SearchError(what=f"{device!r} is no device", where="search_device", fix="give 'cpu', 'cuda' or 'cuda:1'")
    return int(match[1] or 0)
