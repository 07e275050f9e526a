"""Adaptive image retrieval: one index, any query cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
from retrieval.types import (
    CompactReport,
    Duplicate,
    DuplicateGroup,
    Hit,
    Hits,
    IndexInfo,
    IngestReport,
    Latency,
    MetadataField,
    RepairReport,
    SkippedFile,
    UpgradeReport,
    VerifyReport,
)

if TYPE_CHECKING:
    from retrieval.index import Index
    from retrieval.queries import Blend
    from retrieval.retriever import Retriever

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
    "IndexInfo",
    "IndexLockedError",
    "IndexWarning",
    "IngestError",
    "IngestReport",
    "Latency",
    "MetadataField",
    "RepairReport",
    "Retriever",
    "SearchError",
    "SkippedFile",
    "UpgradeReport",
    "VerifyReport",
]

_ON_FIRST_USE = {"Blend": "retrieval.queries", "Index": "retrieval.index", "Retriever": "retrieval.retriever"}


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> object:
    """These are imported on first use: faiss takes as long as all else, and only what searches needs it."""
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'retrieval' has no attribute '{name}'")
