"""Adaptive image retrieval: one index, any query cost."""

from __future__ import annotations

from retrieval.errors import (
    EmbeddingError,
    EncoderMismatchError,
    IndexExistsError,
    IndexFormatError,
    IndexLockedError,
    IndexWarning,
    IngestError,
    SearchError,
)
from retrieval.index import Index
from retrieval.queries import Blend
from retrieval.retriever import Retriever
from retrieval.types import (
    CompactReport,
    Duplicate,
    DuplicateGroup,
    Hit,
    Hits,
    IngestReport,
    RepairReport,
    SkippedFile,
    UpgradeReport,
)

__all__ = [
    "Blend",
    "CompactReport",
    "Duplicate",
    "DuplicateGroup",
    "EmbeddingError",
    "EncoderMismatchError",
    "Hit",
    "Hits",
    "Index",
    "IndexExistsError",
    "IndexFormatError",
    "IndexLockedError",
    "IndexWarning",
    "IngestError",
    "IngestReport",
    "RepairReport",
    "Retriever",
    "SearchError",
    "SkippedFile",
    "UpgradeReport",
]
