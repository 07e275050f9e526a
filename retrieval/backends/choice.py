"""Which kind of index: by how many vectors there are, and what memory they may take. Pure."""

from __future__ import annotations

from retrieval.backends import EXACT, KINDS

EXACT_ROWS = 200_000  # so many are compared one by one in some ten milliseconds
LEAST_ROWS = 1000  # a tenth are held out: recall that fewer queries measure says little


def choose(asked: str, rows: int, dim: int, *, max_ram: int | None) -> tuple[str, str]:
    """A name of INDEX_TYPES for `rows` vectors of width `dim`, and the reason in a few words.

    `asked`: such a name, or "auto". `max_ram`: bytes that the searched vectors may take, for "auto"; None: no limit.
    """
    name, reason = _by_size(rows, dim, max_ram=max_ram) if asked == "auto" else (asked, "as asked")
    if name != EXACT and rows < LEAST_ROWS:
        return EXACT, f"{name} needs {LEAST_ROWS:,} pictures to measure its recall with ({reason})"
    return name, reason


def _by_size(rows: int, dim: int, *, max_ram: int | None) -> tuple[str, str]:
    sizes = {EXACT: 4 * rows * dim} | {name: kind.bytes(rows, dim) for name, kind in KINDS.items()}
    fits = {name: size for name, size in sizes.items() if max_ram is None or size <= max_ram}
    order = (EXACT, "sq", "ivfpq") if rows <= EXACT_ROWS else ("ivfpq",)
    name = next((name for name in order if name in fits), "ivfpq")
    reason = f"{rows:,} vectors, {_megabytes(sizes[name])}"
    if max_ram is not None:
        limit = _megabytes(max_ram)
        reason += f" of {limit} allowed" if name in fits else f", more than the {limit} allowed"
    return name, reason


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
