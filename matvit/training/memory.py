"""Memory that is asked for in vain, told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from matvit.errors import MatVitError, RecipeError, is_out_of_memory


@contextmanager
def room_for(what: str, *, where: str, fix: str, error: type[MatVitError] = RecipeError) -> Iterator[None]:
    """Where what is done within has no room in memory, on a device or on the host, `error` says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:
        if not is_out_of_memory(failure):
            raise
        raise error(what=what, where=where, fix=fix) from failure
