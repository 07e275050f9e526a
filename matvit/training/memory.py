"""Memory that is asked for in vain, told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from matvit.errors import MatVitError, RecipeError


@contextmanager
def room_for(what: str, *, where: str, fix: str, error: type[MatVitError] = RecipeError) -> Iterator[None]:
    """Where what is done within has no room in memory, on a device or on the host, `error` says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:
        # On the host torch has no error of its own for it.
        if not isinstance(failure, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(failure):
            raise
        raise error(what=what, where=where, fix=fix) from failure
