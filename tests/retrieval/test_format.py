"""What is on disk is what docs/formats/index.md says, and an index of the first release stays readable."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import retrieval
from retrieval import Index, Retriever
from retrieval.backends import KINDS
from retrieval.errors import DamagedFileError
from retrieval.items import Item, ItemStore
from retrieval.manifest import (
    ApproximateEntry,
    AskedEntry,
    DeletionsEntry,
    EncoderEntry,
    FileEntry,
    Manifest,
    SegmentEntry,
    upgrade,
)

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "formats" / "index.md"


def tables():
    """The page's tables, each a list of rows, each a list of cells, without the line under the header."""
    blocks = re.findall(r"(?:^\|.*\n)+", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return [[row.strip("|").split("|") for row in block.splitlines() if row != "|---|---|---|"] for block in blocks]


def test_every_field_and_column_is_documented_and_no_other():
    models = Manifest, EncoderEntry, AskedEntry, ApproximateEntry, SegmentEntry, DeletionsEntry
    expected = [[*model.model_fields] for model in models] + [[field.name for field in fields(Item)]]
    expected[-1].append("checksum")
    found = [
        [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        for (header, *rest), *rows in tables()
        if header.strip() in {"field", "column"}
    ]
    assert [sorted(names) for names in found] == [sorted(names) for names in expected]
    assert f"`{{{', '.join(FileEntry.model_fields)}}}`" in DOCUMENT.read_text(encoding="utf-8")


def test_every_parameter_of_an_approximate_index_is_documented():
    [(_, _, *rows)] = [table for table in tables() if table[0][0].strip() == "`parameters` of"]
    found = {name.strip("` "): re.findall(r"`(\w+)`:", have) for name, have in rows}
    assert found == {name: [*kind.parameters(1000, 32)] for name, kind in KINDS.items()}


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


@pytest.fixture
def version_2(tmp_path):
    """Written by commit 36f8c37: as `version_1`, and a list gave 0.png and 1.png the label "dog"."""
    return Path(shutil.copytree(HERE / "formats" / "version-2", tmp_path / "old.index"))


def test_an_index_of_format_2_is_read_and_its_items_are_given_checksums_when_they_are_copied(version_2, elastic):
    index = Index.open(version_2)
    assert index.verify() == []
    expected = Retriever.open(version_2, encoder=elastic).paths()
    tables = [ItemStore(path) for path in version_2.glob("segments/*/items.sqlite")]
    assert [sound for table in tables for _, sound in table.records()] == [False] * 8
    index.compact()
    [table] = [ItemStore(path) for path in version_2.glob("segments/*/items.sqlite")]
    assert [sound for _, sound in table.records()] == [True] * 6
    assert (index.verify(), Retriever.open(version_2, encoder=elastic).paths()) == ([], expected)
    assert index.fields()["label"].pictures == 2


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
    assert all(hasattr(retrieval, name) for name in retrieval.__all__)


@pytest.fixture
def approximate_1(tmp_path):
    """Written by commit 9aa43c7: 0.png to 59.png below /photos, `--index-type sq`, LEAST_ROWS lowered to 60."""
    return Path(shutil.copytree(HERE / "formats" / "version-1-approximate", tmp_path / "old.index"))


def test_the_cache_of_format_1_is_used_and_kept_by_the_next_writer(approximate_1, elastic, picture):
    index = Index.open(approximate_1)
    assert index.verify() == []
    for deleted in (59, None):
        retriever = Retriever.open(approximate_1, encoder=elastic)  # would warn if it did not read the cache
        found = [retriever.search(picture(number), encoder="XL", k=1)[0] for number in range(59)]
        assert [(hit.path.name, round(hit.score, 5)) for hit in found] == [(f"{n}.png", 1.0) for n in range(59)]
        assert index.info().index_parameters == {"bits": 8, "effort": 1, "depth": 20, "held_out": 6}
        if deleted is not None:
            index.delete(Path(f"/photos/{deleted}.png"))
    published = json.loads((approximate_1 / "generations" / "000004.json").read_bytes())
    assert (published["format_version"], published["approximate"]["held_out"]) == (3, 6)


@pytest.mark.parametrize(("rows", "held_out"), [(1000, 100), (5000, 200)])
def test_format_1_held_out_200_rows_or_a_tenth(rows, held_out):
    raw = {"format_version": 1, "approximate": {"segments": {"a": 600, "b": rows - 600}}}
    assert upgrade(raw, path=Path("m"))["approximate"]["held_out"] == held_out


@pytest.mark.parametrize("approximate", ["text", {}, {"segments": 3}, {"segments": {"a": "b"}}])
def test_a_manifest_that_has_not_the_form_of_its_version_is_damaged(approximate):
    with pytest.raises(DamagedFileError, match="does not have the form of format version 1"):
        upgrade({"format_version": 1, "approximate": approximate}, path=Path("m"))
