"""What is deleted stays deleted, and compaction changes nothing but the space that an index takes."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest

import retrieval.snapshot
import retrieval.verify
import retrieval.writer
from retrieval import Index, IndexFormatError, IngestError, Retriever
from retrieval.errors import DamagedFileError
from retrieval.reembed import embed_again
from retrieval.verify import verify_index


@pytest.fixture
def index(tmp_path, photos, elastic):
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


def found(index, elastic, picture):
    """Every picture's id, path and score, as a fresh reader finds them."""
    return Retriever.open(index.path, encoder=elastic).search(picture(1), k=99).hits


def test_pictures_are_deleted_by_id_by_file_and_by_folder(index, photos, elastic, picture, monkeypatch):
    monkeypatch.chdir(photos)
    before = {hit.path.name: hit.id for hit in found(index, elastic, picture)}
    assert index.delete([np.int64(before["1.png"]), photos / "2.png", "sub", photos / "sub" / "7.png"]) == 5
    for reader in (index, Index.open(index.path)):
        assert reader.info().items == 5
    after = {hit.path.name: hit.id for hit in found(index, elastic, picture)}
    assert after == {name: before[name] for name in ("0.png", "3.png", "4.png", "5.png", "6.png")}
    assert index.verify() == []


def test_a_file_that_is_still_there_comes_back_with_a_new_id(index, photos, elastic, picture):
    [old] = [hit.id for hit in found(index, elastic, picture) if hit.path.name == "1.png"]
    index.delete([old])
    assert index.ingest(photos).indexed == 1
    [new] = [hit.id for hit in found(index, elastic, picture) if hit.path.name == "1.png"]
    assert new > max(9, old)


def test_one_picture_or_folder_is_deleted_without_a_list(index, photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert [index.delete(one) for one in ("1.png", photos / "2.png", np.int64(3), 4, "sub/")] == [1, 1, 1, 1, 3]
    assert {path.name for path in Retriever.open(index.path).paths().values()} == {"0.png", "5.png", "6.png"}


@pytest.mark.parametrize("nonsense", [True, b"0.png", "", 1.5, None])
def test_what_is_no_id_and_no_path_deletes_nothing(index, nonsense):
    for items in (nonsense, [nonsense]):
        with pytest.raises(IngestError, match="is no id and no path; give ids"):
            index.delete(items)
    assert index.info().items == 10


@pytest.mark.parametrize("name", ["\ud800.png", "a\0b.png"])
def test_a_name_that_no_file_can_have_deletes_nothing(index, name):
    with pytest.raises(IngestError, match="no file can have the name"):
        index.delete([0, name])
    assert index.info().items == 10


@pytest.mark.parametrize("unknown", [77, "no.png", Path("/photos")])
def test_nothing_is_deleted_when_one_of_them_is_not_there(index, photos, unknown):
    with pytest.raises(IngestError, match=f"holds no (item with id|picture or folder) .*{unknown}"):
        index.delete([0, photos / "2.png", unknown])
    assert (index.info().items, index.generation) == (10, Index.open(index.path).generation)
    assert index.delete([]) == 0


def test_compacting_drops_dead_rows_and_merges_segments_and_nothing_else(index, photos, elastic, picture):
    (photos / "bad.png").touch()
    for seed in range(300, 304):
        (photos / f"{seed}.png").write_bytes(picture(seed))
        index.ingest(photos / f"{seed}.png")
    index.ingest(photos)
    index.delete([3, photos / "sub"])
    expected = found(index, elastic, picture)
    stale = Retriever.open(index.path, encoder=elastic)
    events = []
    report = index.compact(progress=events.append)
    assert [(event.done, event.total) for event in events] == [(0, 6), (6, 6)]
    assert (report.segments, report.dropped) == (1, 4)
    assert report.segments_before >= 5
    assert report.bytes < report.bytes_before
    assert found(index, elastic, picture) == expected == stale.search(picture(1), k=99).hits
    assert [file.path.name for file in index.info().skipped] == ["bad.png"]
    assert index.verify() == []
    assert sum(path.is_file() for path in index.path.rglob("*")) == 6  # CURRENT, manifest, copy, lock, segment's two
    generation = index.generation
    assert index.compact().dropped == 0
    assert index.generation == generation  # there was nothing to do
    assert index.ingest(photos).unchanged == 10


def test_an_object_whose_generation_a_writer_removed_says_so_and_calls_nothing_damaged(index, photos):
    reading = Index.open(index.path)
    index.delete([photos / "1.png"])
    index.compact()
    with pytest.raises(IndexFormatError, match="moved on since generation 2 was opened here") as told:
        reading.fields()
    assert not isinstance(told.value, DamagedFileError)
    assert Index.open(index.path).fields() == {"label": ANY}


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_compacting_writes_segments_of_bounded_size(index, photos, elastic, picture, monkeypatch, rows):
    for seed in range(300, 305):
        (photos / f"{seed}.png").write_bytes(picture(seed))
        index.ingest(photos / f"{seed}.png")
    index.delete([0, 1])
    expected = found(index, elastic, picture)
    monkeypatch.setattr(retrieval.writer, "MERGED_ITEMS", rows)
    index.compact()
    assert found(index, elastic, picture) == expected
    assert index.verify() == []
    generation = index.generation
    index.compact()
    assert index.generation == generation


def test_an_index_that_lost_every_picture_compacts_to_nothing(index, photos):
    index.delete([photos])
    assert index.compact().segments == 0
    assert (index.info().items, index.verify()) == (0, [])
    assert index.ingest(photos).indexed == 10


def test_a_compaction_that_fails_at_any_step_loses_nothing(index, photos, elastic, picture, monkeypatch):
    index.delete([0])
    expected = found(index, elastic, picture)
    real = os.fsync
    for at in range(30):
        calls = []

        def call(descriptor, at=at, calls=calls):
            calls.append(descriptor)
            if len(calls) - 1 == at:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", call)
            try:
                Index.open(index.path).compact()
            except IngestError:
                pass
            else:
                break
        assert found(index, elastic, picture) == expected
        assert index.verify() == []
    assert at >= 4
    assert len(Index.open(index.path)._snapshot.manifest.segments) == 1


def test_a_sample_of_pictures_proves_that_the_encoder_still_matches(index, photos, elastic, monkeypatch):
    assert index.verify(sample=5) == []
    (photos / "0.png").unlink()
    assert index.verify(sample=99) == []  # what is gone says nothing
    report = verify_index(index.path, sample=99, encoder=elastic)
    assert (report.sampled, report.unusable) == (9, 1)
    encode = type(elastic.encoder()).encode
    monkeypatch.setattr(type(elastic.encoder()), "encode", lambda self, pixels: encode(self, pixels)[:, ::-1].copy())
    problems = index.verify(sample=99)
    assert len(problems) == 9
    assert "another embedding than the stored one" in problems[0]


def test_a_sample_of_which_every_file_is_gone_is_told_as_unusable(index, photos):
    for path in photos.rglob("*.png"):
        path.unlink()
    report = index.verify_report(sample=8)
    assert (report.problems, report.sampled, report.unusable) == ((), 0, 8)
    assert index.verify(sample=8) == []


def test_a_sample_without_the_encoder_is_a_problem_not_a_pass(index):
    [problem] = Index.open(index.path).verify(sample=1)
    assert "cannot be loaded from 'fake-source'" in problem


def test_another_encoder_at_the_source_is_told_and_no_problem_unless_a_sample_is_asked_for(index, elastic, monkeypatch):
    other = SimpleNamespace(from_pretrained=lambda source, revision: elastic.in_another_space())
    monkeypatch.setattr("matvit.MatViT", other, raising=False)
    report = verify_index(index.path, sample=None)
    assert (report.problems, report.sampled) == ((), 0)
    assert "is not this index's" in report.unsampled
    assert len(verify_index(index.path, sample=3).problems) == 1
    assert len(verify_index(index.path, sample=None, encoder=elastic.in_another_space()).problems) == 1


def test_an_index_without_any_picture_is_whole_whatever_the_sample(index, elastic):
    index.delete(index.path.parent)
    for sample in (None, 3):
        assert verify_index(index.path, sample=sample, encoder=elastic).problems == ()


def forge(index, monkeypatch, change):
    """Changes the items, and takes their recorded hash for theirs."""
    [path] = index.path.glob("segments/*/items.sqlite")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(change)
    monkeypatch.setattr(retrieval.snapshot, "check_file", lambda *arguments, **named: None)


@pytest.mark.parametrize(
    "metadata",
    ["'[1]'", "'{\"n\": 1e999}'", "'5'", "'{bad'", "'{\"n\": %s}'" % ("1" * 5000), "CAST(x'7b22613a22ff227d' AS TEXT)"],
)
def test_metadata_that_is_no_json_object_is_a_problem(index, monkeypatch, metadata):
    forge(index, monkeypatch, f"UPDATE items SET metadata = {metadata} WHERE id = 1")
    assert any("metadata that is no JSON object" in problem for problem in index.verify())
    if "1e999" not in metadata:
        with pytest.raises(IndexFormatError):
            Index.open(index.path).fields()


def test_values_that_the_table_cannot_have_are_a_problem(index, monkeypatch):
    schema = "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = "
    loose = schema + "replace(sql, ') STRICT', ')')"
    forge(index, monkeypatch, f"{loose}; PRAGMA writable_schema = RESET")
    change = "UPDATE items SET size = 'large' WHERE id = 1; "
    forge(index, monkeypatch, change + schema + "rtrim(sql, char(10)) || ' STRICT'")
    assert any("values that the table cannot have" in problem for problem in index.verify())


def test_a_content_without_a_sha256_is_a_problem_and_not_searched(index, monkeypatch):
    forge(index, monkeypatch, "UPDATE items SET content_sha256 = 'zz' WHERE id = 1")
    assert any("contents without a sha256" in problem for problem in index.verify())
    with pytest.raises(IndexFormatError, match="content has no sha256"):
        Retriever.open(index.path)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE items RENAME TO others; CREATE VIEW items AS WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n "
        "+ 1 FROM x) SELECT others.* FROM others, x",
        "CREATE TRIGGER t AFTER DELETE ON items BEGIN SELECT 1; END",
        "PRAGMA user_version = 99",
        "CREATE TABLE others AS SELECT * FROM items; DROP TABLE items; ALTER TABLE others RENAME TO items",
        "ALTER TABLE items ADD COLUMN more TEXT",
    ],
)
def test_what_is_no_table_of_items_is_refused_before_it_is_read(index, monkeypatch, change):
    forge(index, monkeypatch, change)
    with pytest.raises(IndexFormatError, match="is no table of items"):
        Index.open(index.path)


def test_a_sample_is_taken_anew_where_a_writer_moves_on_meanwhile(index, elastic, monkeypatch, picture, photos):
    def moved_on(*arguments, **named):
        monkeypatch.undo()
        (photos / "more.png").write_bytes(picture(60))
        index.ingest(photos, encoder=elastic)
        index.compact()
        return embed_again(*arguments, **named)

    monkeypatch.setattr(retrieval.verify, "embed_again", moved_on)
    report = verify_index(index.path, sample=3, encoder=elastic)
    assert (report.problems, report.sampled) == ((), 3)


@pytest.mark.parametrize("kind", ["exact", "sq"])
def test_a_segment_in_which_nothing_counts_need_not_be_whole(tmp_path, photos, elastic, picture, kind, monkeypatch):
    monkeypatch.setattr(retrieval.backends.choice, "LEAST_ROWS", 5)
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    (tmp_path / "one.png").write_bytes(picture(70))
    index.ingest(tmp_path / "one.png", encoder=elastic)
    index.set_search(kind)
    index.delete([tmp_path / "one.png"])
    [one] = [entry.name for entry in index._snapshot.manifest.segments if entry.items == 1]
    vectors = index.path / "segments" / one / "embeddings.f32"
    vectors.write_bytes(b"\1" + vectors.read_bytes()[1:])
    assert len(Retriever.open(index.path, encoder=elastic).search(picture(1), k=99)) == 10
    assert len(Index.open(index.path).verify()) == 1
    Index.open(index.path).compact()
    assert Index.open(index.path).verify() == []
