"""What is on disk is what docs/formats/index.md says, and an index of the first release stays readable."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import retrieval
from retrieval import Index, Retriever
from retrieval.backends.build import build_order
from retrieval.items import Item
from retrieval.manifest import (
    ApproximateEntry,
    AskedEntry,
    DeletionsEntry,
    EncoderEntry,
    FileEntry,
    Manifest,
    SegmentEntry,
)

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "formats" / "index.md"


def test_every_field_and_column_is_documented():
    models = Manifest, EncoderEntry, AskedEntry, ApproximateEntry, SegmentEntry, FileEntry, DeletionsEntry
    names = [name for model in models for name in model.model_fields] + [field.name for field in fields(Item)]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.fixture
def version_1(tmp_path):
    """Written by the first release: 3.png changed, 4.png deleted, one file skipped, all below /photos."""
    return Path(shutil.copytree(HERE / "formats" / "version-1", tmp_path / "old.index"))


def test_an_index_of_format_1_is_read(version_1, elastic, picture):
    index = Index.open(version_1)
    info = index.info()
    assert index.verify() == []
    assert (info.items, info.generation, info.encoder_source) == (5, 3, "fake-source")
    assert info.encoder_revision is None
    assert [(file.path, file.reason) for file in info.skipped] == [(Path("/photos/bad.jpg"), "the file is empty")]
    hits = Retriever.open(version_1, encoder=elastic).search(picture(33), encoder="XL", k=2)
    assert (hits[0].id, hits[0].path, round(hits[0].score, 5)) == (3, Path("/photos/3.png"), 1.0)


def test_the_public_names_are_the_documented_ones():
    assert retrieval.__all__ == [
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
    assert all(hasattr(retrieval, name) for name in retrieval.__all__)


def test_an_approximate_index_that_does_not_tell_its_held_out_rows_has_the_200_of_before():
    assert ApproximateEntry.model_fields["held_out"].default == 200
    first, last = build_order(5000, 200)
    assert (len(first), len(last), last[:3].tolist(), last[-1]) == (4800, 200, [0, 25, 50], 4999)
