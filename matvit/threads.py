"""How many threads compute: the one place that decides, for all that shares this process's cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_AT_ONCE = 4  # batches encoded at one time: each holds its activations


def usable_cores() -> int:
    """Cores that this process may run on: a container may own fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def computing_threads() -> int:
    """Threads that compute embeddings and searches: as OMP_NUM_THREADS says, else one for each usable core."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list names nested levels, too
    return int(asked) if asked.isdecimal() and int(asked) else usable_cores()


def batches_at_once() -> int:
    """Batches that are encoded at the same time: few threads each waste less than all threads on one batch."""
    return min(_MOST_AT_ONCE, computing_threads())


@contextmanager
def sharing(batches: int) -> Iterator[None]:
    """Within the block, torch gives each of `batches` calls at the same time its share of the computing threads.

    Threads of torch that wait for one another at every layer wait much longer where something else, such as decoding,
    takes one of their cores. Holds for threads that are started within the block, and for this one.
    """
    torch = sys.modules.get("torch")  # an encoder of another runtime has not loaded it
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, computing_threads() // batches))
    try:
        yield
    finally:
        torch.set_num_threads(before)
