"""Which kind of index: by how many vectors there are, and what memory they may take. Pure."""

from __future__ import annotations

from retrieval.backends import EXACT, KINDS

EXACT_ROWS = 200_000  # so many are compared one by one in some ten milliseconds


def choose(rows: int, dim: int, *, max_ram: int | None) -> tuple[str, str]:
    """A name of INDEX_TYPES for `rows` vectors of width `dim`, and the reason in a few words.

    `max_ram`: bytes that the searched vectors may take; None: no limit.
    """
    sizes = {EXACT: 4 * rows * dim} | {name: kind.bytes(rows, dim) for name, kind in KINDS.items()}
    fits = {name: size for name, size in sizes.items() if max_ram is None or size <= max_ram}
    order = (EXACT, "sq", "ivfpq") if rows <= EXACT_ROWS else ("hnsw", "ivfpq")
    name = next((name for name in order if name in fits), "ivfpq")
    limit = "" if max_ram is None else f" of {max_ram / 1e6:.0f} MB allowed"
    return name, f"{rows:,} vectors, {sizes[name] / 1e6:.0f} MB{limit}"
