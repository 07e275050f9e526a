"""Segments come and go: small ones are merged, replaced ones removed, and readers are not disturbed by it."""

from __future__ import annotations

import os
import resource
import runpy
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import retrieval.ingest
import retrieval.snapshot
from retrieval import Index, IndexFormatError, Retriever
from retrieval.items import ItemStore
from retrieval.manifest import publish_manifest, read_manifest, read_pointer
from retrieval.writer import MERGE_SEGMENTS, Entry, GenerationWriter

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))


@pytest.fixture
def index(tmp_path, photos, elastic):
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


def segments(index):
    return read_manifest(index.path, read_pointer(index.path)).segments


def files_below(folder):
    return {path.name for path in folder.iterdir()}


def add_one_at_a_time(index, photos, picture, count):
    for seed in range(200, 200 + count):
        (photos / f"{seed}.png").write_bytes(picture(seed))
        index.ingest(photos / f"{seed}.png")


def test_pictures_that_come_one_by_one_do_not_pile_up_segments(index, photos, elastic, picture):
    (photos / "bad.png").touch()
    (photos / "3.png").unlink()
    index.ingest(photos, delete=True)
    ids = {hit.path: hit.id for hit in Retriever.open(index.path, encoder=elastic).search(picture(1), k=99)}
    for seed in range(200, 220):
        add_one_at_a_time(index, photos, picture, seed - 199)
        assert len(segments(index)) < MERGE_SEGMENTS
    assert (index.info().items, [file.path.name for file in index.info().skipped]) == (29, ["bad.png"])
    assert index.verify() == []
    retriever = Retriever.open(index.path, encoder=elastic)
    found = retriever.search(picture(219), k=99)
    assert (found[0].path.name, round(found[0].score, 5)) == ("219.png", 1.0)
    assert ids.items() <= {hit.path: hit.id for hit in found}.items()
    assert index.ingest(photos, delete=True).unchanged == 29


def test_writing_and_checking_a_segment_copies_no_embeddings(tmp_path, elastic):
    vectors = np.random.default_rng(0).standard_normal((16_384, 256), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [
        Entry(item=HELPERS["item_of"](number), embedding=vector, replaces=None) for number, vector in enumerate(vectors)
    ]
    index = Index.create(tmp_path / "photos.index", encoder=replace(elastic, embedding_dim=256))
    tracemalloc.start()
    try:
        with index._writing() as writer:
            writer.publish(entries, deleted={}, roots={"root": "/photos"}, next_id=len(entries))
        assert index.verify() == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < vectors.nbytes / 2


def test_a_large_ingest_leaves_few_segments_and_takes_no_space_twice(tmp_path, photos, elastic, picture, monkeypatch):
    for module, name, value in (
        (retrieval.pipeline, "BATCH", 1),
        (retrieval.ingest, "PUBLISH_ITEMS", 1),
        (retrieval.writer, "SMALL_ITEMS", 1),
        (retrieval.writer, "MANY_SEGMENTS", 3),
        (retrieval.writer, "MERGE_SEGMENTS", 2),
        (retrieval.writer, "MERGED_ITEMS", 4),
    ):
        monkeypatch.setattr(module, name, value)
    index = Index.build(photos, encoder=elastic, path=tmp_path / "many.index")
    assert sorted(segment.items for segment in segments(index)) == [2, 4, 4]
    assert files_below(index.path / "segments") == {segment.name for segment in segments(index)}
    assert index.verify() == []
    assert index.ingest(photos).unchanged == 10


@pytest.mark.parametrize("opens", [Index.open, Retriever.open])
def test_an_index_of_more_segments_than_files_may_be_open_is_opened(index, photos, picture, monkeypatch, opens):
    monkeypatch.setattr(GenerationWriter, "merge_small", lambda writer: False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))
    add_one_at_a_time(index, photos, picture, 64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 32, hard))
    try:
        opens(index.path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_segment_that_lost_all_its_items_is_dropped(index, photos, monkeypatch):
    monkeypatch.setattr(retrieval.writer, "MERGE_SEGMENTS", 2)
    for path in photos.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert index.ingest(photos).unchanged == 10
    assert [segment.items for segment in segments(index)] == [10]


def test_what_the_newest_generation_does_not_name_is_removed_by_the_next_run(index, photos, picture):
    (photos / "3.png").unlink()
    index.ingest(photos, delete=True)
    [entry] = read_manifest(index.path, read_pointer(index.path)).deletions.values()
    (photos / "4.png").unlink()
    index.ingest(photos, delete=True)
    index.ingest(photos)
    assert entry.file not in files_below(index.path / "deletions")
    assert len(files_below(index.path / "deletions")) == 1
    assert files_below(index.path / "generations") == {"000004.json", "000004.copy.json"}
    add_one_at_a_time(index, photos, picture, 2 * MERGE_SEGMENTS)
    index.ingest(photos)
    assert files_below(index.path / "segments") == {segment.name for segment in segments(index)}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors through /proc")
def test_no_file_of_an_index_stays_open(index, photos, elastic, picture):
    add_one_at_a_time(index, photos, picture, 3)
    before = files_below(Path("/proc/self/fd"))
    opened = Index.open(index.path), Retriever.open(index.path, encoder=elastic)
    opened[1].search(picture(1))
    assert len(files_below(Path("/proc/self/fd"))) == len(before)


def test_a_reader_answers_from_its_generation_after_its_segments_are_gone(index, photos, elastic, picture):
    retriever, stale = Retriever.open(index.path, encoder=elastic), Index.open(index.path)
    expected, info = retriever.search(picture(1), k=99).hits, stale.info()
    old = segments(index)[0].name
    add_one_at_a_time(index, photos, picture, MERGE_SEGMENTS)
    assert old not in files_below(index.path / "segments")
    assert retriever.search(picture(1), k=99).hits == expected
    assert stale.info() == info
    retriever.reload()
    assert len(retriever) == 10 + MERGE_SEGMENTS


@pytest.mark.parametrize("items", [lambda path: Index.open(path).info().items, lambda path: len(Retriever.open(path))])
def test_opening_while_a_writer_replaces_every_segment_shows_the_new_state(index, photos, picture, monkeypatch, items):
    def replaced_meanwhile(folder, manifest, entry):
        monkeypatch.setattr(retrieval.snapshot, "open_segment", open_segment)
        add_one_at_a_time(index, photos, picture, MERGE_SEGMENTS)
        return open_segment(folder, manifest, entry)

    open_segment = retrieval.snapshot.open_segment
    monkeypatch.setattr(retrieval.snapshot, "open_segment", replaced_meanwhile)
    assert items(index.path) == 10 + MERGE_SEGMENTS


def test_items_that_a_writer_has_just_removed_are_not_made_anew(tmp_path):
    with pytest.raises(IndexFormatError, match="a file of the index is missing"):
        list(ItemStore(tmp_path / "items.sqlite").all())
    assert list(tmp_path.iterdir()) == []


def test_verify_while_a_writer_replaces_every_segment_finds_no_problem(index, photos, picture, monkeypatch):
    def replaced_meanwhile(folder, manifest, entry):
        monkeypatch.setattr(retrieval.verify, "open_segment", open_segment)
        add_one_at_a_time(index, photos, picture, MERGE_SEGMENTS)
        return open_segment(folder, manifest, entry)

    open_segment = retrieval.verify.open_segment
    monkeypatch.setattr(retrieval.verify, "open_segment", replaced_meanwhile)
    assert index.verify() == []


def test_a_writer_that_never_rests_is_told_after_some_attempts(index, photos, picture, monkeypatch):
    def replaced(folder, manifest, entry):
        shutil.rmtree(folder / "segments" / entry.name, ignore_errors=True)
        publish_manifest(folder, manifest.model_copy(update={"generation": manifest.generation + 1}))
        return open_segment(folder, manifest, entry)

    open_segment = retrieval.snapshot.open_segment
    monkeypatch.setattr(retrieval.snapshot, "open_segment", replaced)
    monkeypatch.setattr(retrieval.verify, "open_segment", replaced)
    for attempt in (Index.open, lambda path: index.verify()):
        with pytest.raises(IndexFormatError, match="what was being read 20 times in a row; run the same again"):
            attempt(index.path)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_merge_that_fails_at_any_step_loses_nothing(index, photos, elastic, picture, monkeypatch, failing, name):
    monkeypatch.setattr(GenerationWriter, "merge_small", lambda writer: False)
    (photos / "3.png").unlink()
    index.ingest(photos, delete=True)
    add_one_at_a_time(index, photos, picture, MERGE_SEGMENTS)
    monkeypatch.undo()
    failed = 0
    for at in range(20):
        folder = Path(shutil.copytree(index.path, index.path.with_name(f"at-{at}")))
        with failing(name, at=at):
            try:
                Index.open(folder).ingest(photos, encoder=elastic)
            except retrieval.IngestError:
                failed += 1
        after = Index.open(folder)
        assert (after.info().items, after.verify()) == (9 + MERGE_SEGMENTS, [])
    assert failed >= 3
    assert len(segments(after)) == 1


def test_a_descriptor_that_is_not_to_be_had_is_one_sentence(index, elastic, monkeypatch):
    def refuse(*arguments, **named):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(retrieval.snapshot.np, "memmap", refuse)
    with pytest.raises(IndexFormatError, match=r"cannot be read \(Too many open files"):
        Retriever.open(index.path, encoder=elastic)
