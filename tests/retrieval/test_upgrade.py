"""Another encoder: embedded aside, adopted in one step, resumed after an interrupt; what is missing is told."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import retrieval.upgrade
from retrieval import EncoderMismatchError, Index, IndexFormatError, IngestError, Retriever
from retrieval.backends import cache, choice
from retrieval.manifest import read_pointer


@pytest.fixture
def index(tmp_path, photos, elastic):
    (photos / "bad.png").write_text("no picture")
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


@dataclass
class OtherElastic:
    """`elastic` turned by a fixed rotation: another space, in which nothing of the first makes sense."""

    inner: object
    encoded: int = 0
    fail_after: int = 10**9

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encoder(self, spec=None):
        return Turned(self.inner.encoder(spec), self)


@dataclass
class Turned:
    inner: object
    owner: OtherElastic

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, pixels):
        if self.owner.encoded >= self.owner.fail_after:
            raise KeyboardInterrupt
        self.owner.encoded += len(pixels)
        return np.ascontiguousarray(self.inner.encode(pixels)[:, ::-1])

    def embed(self, images):
        return self.encode(self.preprocess(images))


@pytest.fixture
def other(elastic):
    return OtherElastic(elastic.in_another_space())


@pytest.fixture
def approximate(index, monkeypatch):
    """The same, searched by an approximate index."""
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)
    assert index.set_search("sq").index_type == "sq"
    return index


def test_an_upgrade_builds_the_approximate_index_again(approximate, other):
    old = approximate._snapshot.manifest.approximate
    approximate.upgrade(other)
    manifest = approximate._snapshot.manifest
    assert list(manifest.approximate.segments) == [segment.name for segment in manifest.segments]
    assert (manifest.index_type, manifest.index_reason) == ("sq", "as asked")
    assert [file.name for file in (approximate.path / "cache").iterdir()] == [manifest.approximate.file] != [old.file]
    assert approximate.verify() == []


def test_after_an_upgrade_that_was_stopped_before_it_built_every_vector_is_compared(approximate, other, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "build", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            approximate.upgrade(other)
    assert approximate.info().index_type == "exact"
    assert approximate.verify() == []
    approximate.compact()
    assert approximate.info().index_type == "sq"


def ids(index, encoder, picture):
    return {hit.path: hit.id for hit in Retriever.open(index.path, encoder=encoder).search(picture(1), k=99)}


def test_every_picture_moves_to_the_new_space_and_keeps_its_id(index, photos, elastic, other, picture):
    index.delete([photos / "3.png"])
    before = ids(index, elastic, picture)
    serving = Retriever.open(index.path, encoder=elastic)
    report = index.upgrade(other)
    assert (report.embedded, report.resumed, report.missing, report.published) == (9, 0, (), True)
    assert ids(index, other, picture) == before
    assert index.verify(sample=9) == []
    assert [file.path.name for file in index.info().skipped] == ["bad.png"]
    assert not (index.path / "upgrade").exists()
    assert len(serving.search(picture(1), k=99)) == 9  # still answers from the generation that it opened
    with pytest.raises(EncoderMismatchError):
        serving.reload()
    assert index.ingest(photos).indexed == 1  # the deleted one is new
    assert all(not name.startswith(".tmp") for _, _, names in os.walk(index.path) for name in names)


def test_the_old_index_serves_and_grows_while_an_interrupted_upgrade_waits(
    index, photos, elastic, other, picture, monkeypatch
):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.upgrade, "PUBLISH_ITEMS", 2)
    other.fail_after = 6
    with pytest.raises(KeyboardInterrupt):
        index.upgrade(other)
    assert index.verify(sample=10) == []
    (photos / "new.png").write_bytes(picture(50))
    (photos / "0.png").write_bytes(picture(60))
    (photos / "1.png").unlink()
    index.ingest(photos, encoder=elastic, delete=True)
    before = ids(index, elastic, picture)
    other.fail_after, other.encoded = 10**9, 0
    report = Index.open(index.path).upgrade(other)
    assert report.published
    assert report.resumed >= 2
    assert (report.embedded, report.embedded + report.resumed) == (other.encoded, 10)
    assert ids(index, other, picture) == before
    assert Index.open(index.path).verify() == []
    [found] = Retriever.open(index.path, encoder=other).search(picture(60), k=1)
    assert (found.path.name, round(found.score, 5)) == ("0.png", 1.0)


def test_folders_that_a_copy_or_a_loss_of_power_left_out_because_they_are_empty_are_made_again(
    index, photos, elastic, other
):
    other.fail_after = 0
    with pytest.raises(KeyboardInterrupt):
        index.upgrade(other)
    for name in ("deletions", "upgrade/segments", "upgrade/deletions"):
        (index.path / name).rmdir()
    other.fail_after = 10**9
    assert Index.open(index.path).upgrade(other).published
    (index.path / "deletions").rmdir()
    Index.open(index.path).delete([photos / "1.png"])
    assert Index.open(index.path).verify() == []


def test_nothing_changes_while_pictures_are_missing_and_nothing_is_embedded_twice(
    index, photos, elastic, other, picture
):
    before = ids(index, elastic, picture)
    data = (photos / "2.png").read_bytes()
    (photos / "2.png").unlink()
    generation = index.generation
    report = index.upgrade(other)
    assert not report.published
    assert [(file.path.name, file.reason) for file in report.missing] == [("2.png", "no such file")]
    assert (index.generation, ids(index, elastic, picture)) == (generation, before)
    report = index.upgrade(other, drop_missing=True)
    assert (report.embedded, report.resumed, report.published) == (0, 9, True)
    assert index.verify() == []
    assert sorted(file.path.name for file in index.info().skipped) == ["2.png", "bad.png"]
    (photos / "2.png").write_bytes(data)
    assert index.ingest(photos).indexed == 1
    assert ids(index, other, picture) == before  # also its id


def test_a_file_that_was_missing_is_read_when_it_is_back_empty_and_dated_1970(index, photos, other):
    (photos / "2.png").unlink()
    index.upgrade(other, drop_missing=True)
    (photos / "2.png").touch()
    os.utime(photos / "2.png", ns=(0, 0))
    index.ingest(photos)
    assert {file.path.name: file.reason for file in index.info().skipped}["2.png"] == "the file is empty"


def test_ids_given_away_while_an_upgrade_waits_are_not_given_again(index, photos, elastic, other, picture):
    missing = (photos / "2.png").rename(photos.parent / "2.png")
    assert not index.upgrade(other).published
    (photos / "new.png").write_bytes(picture(50))
    missing.rename(photos / "2.png")
    index.ingest(photos, encoder=elastic)
    (photos / "new.png").unlink()
    (photos / "2.png").unlink()
    index.ingest(photos, encoder=elastic, delete=True)
    given = index._snapshot.manifest.next_id
    report = index.upgrade(other)  # nothing is left to stage
    assert (report.embedded, report.published) == (0, True)
    assert index._snapshot.manifest.next_id == given


def test_a_file_that_changed_is_embedded_as_it_is_now(index, photos, other, picture):
    (photos / "2.png").write_bytes(picture(70))
    assert index.upgrade(other).published
    assert index.verify(sample=10) == []
    report = index.ingest(photos)
    assert (report.indexed, report.unchanged) == (0, 10)


def test_the_same_space_is_refused(index, elastic):
    with pytest.raises(IngestError, match="is in this encoder's embedding space already"):
        index.upgrade(elastic)


def test_an_encoder_that_moved_is_noted_and_nothing_embedded(index, elastic, picture, tmp_path):
    before, generation = ids(index, elastic, picture), index.generation
    moved = OtherElastic(elastic)
    moved.source = str(tmp_path / "moved")  # instead of its own
    report = index.upgrade(moved)
    assert (report.embedded, report.published, index.generation) == (0, True, generation + 1)
    opened = Index.open(index.path)
    assert opened.info().encoder_source == str(tmp_path / "moved")
    assert (ids(opened, elastic, picture), opened.verify()) == (before, [])
    with pytest.raises(IngestError, match="is in this encoder's embedding space already"):
        index.upgrade(moved)


def test_what_is_staged_counts_where_the_files_have_other_times_than_the_index(index, other, photos, picture):
    for path in photos.rglob("*.png"):
        os.utime(path, (1, 1))
    (photos / "2.png").unlink()
    assert not index.upgrade(other).published
    (photos / "2.png").write_bytes(picture(2))
    report = index.upgrade(other)
    assert (report.embedded, report.resumed, report.published) == (1, 9, True)


def test_a_staged_upgrade_of_another_encoder_is_begun_anew(index, other, elastic, picture, photos):
    (photos / "2.png").unlink()
    assert not index.upgrade(other).published
    (photos / "2.png").write_bytes(picture(2))
    third = OtherElastic(elastic.in_another_space())
    third.inner.space_id = "b" * 64
    report = index.upgrade(third)
    assert (report.embedded, report.resumed) == (10, 0)
    assert index.info().space_id == "b" * 64


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_upgrade_that_fails_at_any_step_leaves_one_whole_space(index, elastic, other, picture, failing, name):
    expected = ids(index, elastic, picture)
    for at in range(60):
        with failing(name, at=at):
            try:
                Index.open(index.path).upgrade(other)
            except IngestError as error:
                assert "No space left on device" in str(error)  # noqa: PT017 - the last attempt must succeed
            else:
                break
        now = Index.open(index.path)
        assert now.verify() == []
        if now.info().space_id == other.space_id:  # only syncing the folder failed
            break
        assert ids(index, elastic, picture) == expected
    assert at >= 4
    assert ids(index, other, picture) == expected


@pytest.fixture
def staging(index, other, monkeypatch):
    """What an interrupted upgrade has left: three segments of two pictures."""
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "batches_at_once", lambda: 1)
    monkeypatch.setattr(retrieval.upgrade, "PUBLISH_ITEMS", 2)
    other.fail_after = 8
    with pytest.raises(KeyboardInterrupt):
        index.upgrade(other)
    other.fail_after = 10**9
    return index.path / "upgrade"


@contextmanager
def refused(monkeypatch, folder):
    """No file below `folder` can be read, since the process has too many open."""

    def refusing(real):
        def call(path, *arguments, **named):
            if folder in path.parents:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path))
            return real(path, *arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "read_bytes"):
            patch.setattr(Path, name, refusing(getattr(Path, name)))
        yield


def staged_segments(staging):
    return len(Index.open(staging)._snapshot.segments)


@pytest.mark.parametrize("part", ["generations", "segments"])
def test_a_read_that_fails_once_discards_nothing_of_what_is_staged(index, photos, other, staging, monkeypatch, part):
    before = staged_segments(staging)
    with refused(monkeypatch, staging / part):
        index.delete([photos / "4.png"])
        with pytest.raises(IndexFormatError, match="Too many open files"):
            index.upgrade(other)
    assert staged_segments(staging) == before >= 2
    report = index.upgrade(other)
    assert report.published
    assert report.resumed >= 3
    assert index.verify() == []


@pytest.mark.parametrize("name", ["embeddings.f32", "items.sqlite"])
def test_only_damaged_segments_of_what_is_staged_are_embedded_again(
    index, photos, elastic, other, staging, picture, name
):
    before = ids(index, elastic, picture)
    path = next(path for path in sorted((staging / "segments").glob(f"*/{name}")) if path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    index.delete([photos / "4.png"])
    assert path.exists()
    other.encoded = 0
    report = index.upgrade(other)
    assert report.published
    assert report.resumed >= 1
    assert report.embedded == other.encoded == 9 - report.resumed
    del before[photos / "4.png"]
    assert ids(index, other, picture) == before
    assert index.verify(sample=9) == []


def test_a_staged_manifest_that_is_damaged_or_newer_is_told_and_kept(index, photos, other, staging):
    pointer = read_pointer(staging)
    path = staging / "generations" / pointer.name
    whole, current = path.read_bytes(), (staging / "CURRENT").read_bytes()

    newer = whole.replace(b'"format_version": 3', b'"format_version": 9')
    path.write_bytes(newer)
    (staging / "CURRENT").write_text(f"{pointer.name} {hashlib.sha256(newer).hexdigest()}\n")
    index.delete([photos / "4.png"])
    with pytest.raises(IndexFormatError, match="newer than the 3"):
        index.upgrade(other)

    (staging / "CURRENT").write_bytes(current)
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    index.delete([photos / "5.png"])
    with pytest.raises(IndexFormatError, match=r"cannot go on: .*; mend it with: matvit repair .*upgrade, or remove"):
        index.upgrade(other)
    assert Index.repair(staging).whole
    report = index.upgrade(other)
    assert report.published
    assert report.resumed >= 2


def test_what_a_killed_creation_or_removal_has_left_is_begun_anew(index, photos, other, staging):
    (staging / "CURRENT").unlink()
    report = index.upgrade(other)
    assert (report.resumed, report.published) == (0, True)
