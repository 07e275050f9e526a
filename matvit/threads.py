"""How many threads compute: the one place that decides, for all that shares this process's cores.

Alone, torch and faiss each take OMP_NUM_THREADS threads, or one for each core; where both use one OpenMP library, a
limit for one holds for the other, too. Their threads wait for one another many times in each call, and much longer
where something else has one of their cores: what works at the same time must be `limited`.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

_MOST_AT_ONCE = 4  # batches encoded at one time: each holds its activations
_CALLS = {"torch": ("get_num_threads", "set_num_threads"), "faiss": ("omp_get_max_threads", "omp_set_num_threads")}


def usable_cores() -> int:
    """Cores that this process may run on: a container may own fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def computing_threads() -> int:
    """Threads that compute embeddings: as OMP_NUM_THREADS says, else one for each usable core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list names nested levels, too
    return int(asked) if asked.isdecimal() and int(asked) else usable_cores()


def batches_at_once() -> int:
    """Batches that are encoded at the same time: few threads each waste less than all threads on one batch."""
    return min(_MOST_AT_ONCE, computing_threads())


def threads_of_each() -> int:
    """Threads of each of `batches_at_once`."""
    return max(1, computing_threads() // batches_at_once())


def for_queries(count: int) -> AbstractContextManager[None]:
    """Within the block, faiss compares one query on one thread: others have no share in it, and are waited for."""
    return limited("faiss", 1) if count == 1 else nullcontext()


class limited:  # noqa: N801 - a class, since a generator takes as long as a tenth of a small search
    """Within the block, each call of `library` by this thread, or one started within the block, takes so many threads.

    Nothing happens where it is not loaded: then nothing calls it either.
    """

    def __init__(self, library: Literal["torch", "faiss"], threads: int) -> None:
        self._module, self._names, self._threads = sys.modules.get(library), _CALLS[library], threads
        self._before = threads

    def __enter__(self) -> None:
        if self._module is not None:
            self._before = getattr(self._module, self._names[0])()
            self._put(self._threads)

    def __exit__(self, *_: object) -> None:
        if self._module is not None:
            self._put(self._before)

    def _put(self, threads: int) -> None:
        if self._before != self._threads:
            getattr(self._module, self._names[1])(threads)
