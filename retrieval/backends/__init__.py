"""Ways to search an index that are quicker or smaller than comparing every vector, by name."""

from __future__ import annotations

from retrieval.backends.kinds import HNSW, IvfPq, Kind, ScalarQuantised

KINDS: dict[str, Kind] = {"hnsw": HNSW(), "ivfpq": IvfPq(), "sq": ScalarQuantised()}
"""Each finds candidates only: exact scores from the raw embeddings decide (see `retrieval.backends.approximate`)."""
EXACT = "exact"
INDEX_TYPES = (EXACT, *KINDS)

__all__ = ["EXACT", "INDEX_TYPES", "KINDS", "Kind"]
