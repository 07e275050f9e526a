"""Ingest brings an index up to date: what is counted, kept, re-embedded, skipped and forgotten."""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrieval.found_files
import retrieval.ingest
import retrieval.known
import retrieval.manifest
import retrieval.snapshot
import retrieval.writer
from retrieval import EmbeddingError, EncoderMismatchError, Index, IndexExistsError, IngestError, Retriever
from retrieval.encoders import check_query_encoder, describe
from retrieval.errors import DiskRefusalError
from retrieval.items import Item, ItemStore, write_items
from retrieval.known import KnownItems
from retrieval.loading import Loader
from retrieval.sources import is_below


def counts(report):
    return report.indexed, report.unchanged, report.deleted, len(report.skipped)


def id_of(index_path, elastic, picture, k=1):
    [hit] = Retriever.open(index_path, encoder=elastic).search(picture, k=k)
    return hit.id, hit.path


@pytest.fixture
def index(tmp_path, photos, elastic):
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


def test_build_then_open_shows_the_same_index(index, photos, elastic):
    info = Index.open(index.path).info()
    assert info == index.info()
    assert (info.items, info.skipped, info.encoder_spec, info.encoder_resolution) == (10, (), "XL", 8)
    assert (info.space_id, info.weights_sha256, info.index_type) == (elastic.space_id, elastic.weights_sha256, "exact")
    assert index.verify() == []


def test_a_rerun_embeds_nothing_and_publishes_nothing(index, photos, elastic, monkeypatch):
    monkeypatch.setattr(type(elastic.encoder()), "encode", None)  # any use would fail
    generation = index.generation
    assert counts(index.ingest(photos)) == (0, 10, 0, 0)
    assert index.generation == generation


def test_one_more_picture_costs_nothing_of_the_others(index, tmp_path, elastic, picture, monkeypatch):
    (tmp_path / "one.png").write_bytes(picture(77))
    looked_at, opened = [], []
    for module, name, seen in ((KnownItems, "_known", looked_at), (retrieval.snapshot, "open_segment", opened)):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, seen=seen: seen.append(a[-1]) or real(*a))
    monkeypatch.setattr("retrieval.backends.cache.refresh", None)  # the index is exact: there is nothing to build
    assert counts(index.ingest(tmp_path / "one.png")) == (1, 0, 0, 0)
    assert looked_at == []
    assert [entry.items for entry in opened] == [1]


def test_many_files_are_compared_as_few_are(index, photos, tmp_path, elastic, picture, monkeypatch):
    monkeypatch.setattr(retrieval.found_files, "_FEW", 0)  # so that the folders around them are looked up
    (photos / "3.png").write_bytes(picture(33))
    shutil.copy(photos / "5.png", tmp_path / "copy.png")
    named = [photos / "3.png", photos / "sub" / "8.png", tmp_path / "copy.png"]
    assert counts(index.ingest(named)) == (2, 1, 0, 0)
    (photos / "4.png").unlink()
    assert counts(index.ingest(photos, delete=True)) == (0, 9, 1, 0)
    assert index.verify() == []


PARTS = ("a", "a-b", "a.tar", "a.tar#", "a#b", "b", "\udcff")


@settings(max_examples=40)
@given(
    paths=st.sets(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), min_size=1, max_size=25),
    asked=st.lists(
        st.lists(st.sampled_from(PARTS), max_size=3).map(lambda parts: "/".join(["/photos", *parts])), max_size=4
    ),
)
def test_what_lies_at_or_below_places_is_found_under_every_root_and_nothing_else_is_copied(
    tmp_path_factory, paths, asked
):
    folder = tmp_path_factory.mktemp("items")
    roots = {"all": "/photos", "deep": "/photos/a"}
    places = {(name, path) for name in roots for path in paths}
    items = [
        Item(id=n, root=root, path=os.fsencode(path), content_sha256="", size=0, mtime_ns=0, width=None, height=None,
             status="skipped", reason="", row=None)
        for n, (root, path) in enumerate(sorted(places))
    ]  # fmt: skip
    write_items(folder / "items.sqlite", items)
    store = ItemStore(folder / "items.sqlite")
    segment = SimpleNamespace(entry=SimpleNamespace(name="one"), items=store, deleted=np.empty(0, dtype=np.int64))
    known = KnownItems(SimpleNamespace(segments=[segment], manifest=SimpleNamespace(roots=roots)), asked)
    files = {item.id: os.path.join(roots[item.root], os.fsdecode(item.path)) for item in items}  # noqa: PTH118
    for place in asked:
        found = [known.item.id for known in known.at_or_below(place)]
        assert sorted(found) == [n for n, file in files.items() if file == place or is_below(file, [place])]
    copied = {n for n, file in files.items() if any(file == place or is_below(file, [place]) for place in asked)}
    assert copied == {item.id for item in items if known.at(*item.place)}


def test_a_changed_file_keeps_its_id_and_only_its_new_content_is_found(index, photos, elastic, picture):
    old_id, path = id_of(index.path, elastic, picture(3))
    path.write_bytes(picture(33))
    assert counts(index.ingest(photos)) == (1, 9, 0, 0)
    assert id_of(index.path, elastic, picture(33)) == (old_id, path)
    hits = Retriever.open(index.path, encoder=elastic).search(picture(3), k=99)
    assert len(hits) == 10
    assert hits[0].score < 0.99
    assert index.verify() == []


def test_a_file_changed_and_changed_back_is_found_again(index, photos, elastic, picture):
    path = photos / "3.png"
    status = path.stat()
    for content in (picture(33), picture(3)):
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + len(content)))
        index.ingest(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    index.ingest(path)
    assert index.verify() == []
    assert id_of(index.path, elastic, picture(3))[1] == path


def test_what_was_encoded_before_an_error_that_is_not_the_disks_is_published(tmp_path, photos, elastic, monkeypatch):
    def encode(self, pixels):
        calls.append(len(pixels))
        if len(calls) > 2:
            raise IngestError(what="the remote encoder is gone", where="encoder", fix="start it")
        return real(self, pixels)

    calls, real = [], type(elastic.encoder()).encode
    index = Index.create(tmp_path / "i", encoder=elastic)
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "batches_at_once", lambda: 1)
    monkeypatch.setattr(type(elastic.encoder()), "encode", encode)
    with pytest.raises(IngestError, match="the remote encoder is gone"):
        index.ingest(photos)
    assert index.info().items == 4


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_index_that_is_replaced_by_another_while_it_is_written_is_left_as_that_is(
    tmp_path, photos, elastic, picture, monkeypatch, interrupted
):
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    index = Index.create(tmp_path / "i", encoder=elastic)

    def replace_it(event):
        if index.path.with_name("moved").exists() or event.done < 5:
            return
        index.path.rename(index.path.with_name("moved"))
        shutil.copytree(index.path.with_name("moved"), index.path)
        other = Index.open(index.path)
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(picture(80 + number))
            other.ingest(tmp_path / f"{number}.png", encoder=elastic)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(retrieval.ingest, "_PROGRESS_SECONDS", 0)
    with pytest.raises(IngestError, match="was moved or replaced while it was written"):
        index.ingest(photos, encoder=elastic, progress=replace_it)
    opened = Index.open(index.path)
    assert len([path for path in Retriever.open(index.path).paths().values() if path.parent == tmp_path]) == 3
    assert opened.verify() == []


def test_a_touched_file_with_equal_content_is_unchanged_and_then_not_even_read(index, photos, elastic, monkeypatch):
    os.utime(photos / "3.png", ns=(1, 1))
    assert counts(index.ingest(photos)) == (0, 10, 0, 0)
    monkeypatch.setattr(Loader, "load", None)
    assert counts(index.ingest(photos)) == (0, 10, 0, 0)
    assert index.verify() == []


def test_delete_forgets_only_files_that_are_gone_from_the_named_folders(index, photos, elastic, picture):
    (photos / "3.png").unlink()
    (photos / "sub" / "8.png").unlink()
    kept = index.ingest(photos)
    assert (counts(kept), kept.gone) == ((0, 8, 0, 0), 2)
    assert index.info().items == 10  # without delete=True nothing is forgotten
    assert index.ingest(photos / "sub").gone == 1
    assert counts(index.ingest(photos / "sub", delete=True)) == (0, 2, 1, 0)
    assert index.info().items == 9
    pruned = index.ingest(photos, delete=True)
    assert (counts(pruned), pruned.gone) == ((0, 8, 1, 0), 0)
    assert {hit.path.name for hit in Retriever.open(index.path, encoder=elastic).search(picture(3), k=99)} == {
        f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7, 9)
    }
    assert index.verify() == []


@pytest.fixture
def albums(tmp_path, photos, elastic):
    """An index over two folders: photos, of which one picture could not be read, and more."""
    (tmp_path / "more").mkdir()
    (photos / "0.png").rename(tmp_path / "more" / "0.png")
    (photos / "bad.png").touch()
    return Index.build([photos, tmp_path / "more"], encoder=elastic, path=tmp_path / "albums.index")


def test_delete_forgets_a_named_file_that_is_gone_itself_but_not_one_whose_folder_may_be_away(albums, tmp_path, photos):
    more = tmp_path / "more"
    (photos / "1.png").unlink()
    (tmp_path / "list.txt").write_text("photos/2.png\nphotos/1.png\n")
    assert counts(albums.ingest([more, photos / "1.png"])) == (0, 1, 0, 1)
    assert counts(albums.ingest([more, tmp_path / "list.txt"])) == (0, 2, 0, 1)
    assert counts(albums.ingest([more, tmp_path / "list.txt"], delete=True)) == (0, 2, 1, 0)
    photos.rename(tmp_path / "away")
    report = albums.ingest([more, tmp_path / "list.txt", tmp_path / "misspelt"], delete=True)
    assert (counts(report), report.gone) == ((0, 1, 0, 3), 1)
    assert {file.path.name: "may be away" in file.reason for file in report.skipped} == {
        "2.png": True,
        "1.png": False,  # the index has it no more
        "misspelt": False,
    }
    assert albums.verify() == []


@pytest.mark.parametrize("left", [None, "", "notes.md"])
def test_delete_forgets_nothing_of_a_named_folder_of_which_nothing_is_there(albums, tmp_path, photos, left):
    photos.rename(tmp_path / "away")
    if left is not None:  # an unmounted disk's mount point
        photos.mkdir()
        (photos / left).touch()
    report = albums.ingest([tmp_path / "more", photos], delete=True)
    assert (counts(report), report.gone) == ((0, 1, 0, 1), 10)
    assert [(file.path, "a disk may be away" in file.reason) for file in report.skipped] == [(photos, True)]
    assert (albums.info().items, albums.verify()) == (10, [])
    found_again = albums.ingest([tmp_path / "more", tmp_path], delete=True)
    assert counts(found_again) == (0, 10, 0, 2 if left == "" else 1)  # bad.png, and what it was in
    assert albums.info().items == 10


@pytest.mark.parametrize("left", ["empty", "dangling link", "gone", "file", "other file"])
def test_delete_forgets_nothing_below_an_emptied_folder_since_it_may_be_a_mount_point(photos, tmp_path, elastic, left):
    disk = photos / "disk"
    (photos / "sub").rename(tmp_path / "sub")
    disk.mkdir()
    (tmp_path / "sub").rename(disk / "sub")
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    disk.rename(tmp_path / "away")
    if left == "dangling link":
        disk.symlink_to(tmp_path / "unmounted" / "disk")
    elif left == "file":
        disk.touch()
    elif left != "gone":
        disk.mkdir()
    if left == "other file":  # so it is no mount point
        (disk / "notes.md").touch()
    report = index.ingest(photos, delete=True)
    kept = left in ("empty", "dangling link")
    assert (report.deleted, report.gone) == ((0, 3) if kept else (3, 0))
    assert [file.path for file in report.skipped if "may be away" in file.reason] == ([disk] if kept else [])
    assert (index.info().items, index.verify()) == (10 if kept else 7, [])


def test_delete_forgets_what_is_gone_of_a_folder_that_is_there_by_another_name(index, tmp_path, photos):
    (tmp_path / "link").symlink_to(photos)
    (photos / "1.png").unlink()
    assert counts(index.ingest([tmp_path / "link", photos], delete=True)) == (9, 0, 1, 0)


def test_a_renamed_folder_keeps_its_ids_and_is_not_embedded_again(albums, tmp_path, photos, elastic, monkeypatch):
    def ids():
        hits = Retriever.open(albums.path, encoder=elastic).search(tmp_path / "more" / "0.png", k=99)
        return {hit.path.name: hit.id for hit in hits}

    before = ids()
    photos.rename(tmp_path / "renamed")
    (tmp_path / "renamed" / "copy.png").write_bytes((tmp_path / "renamed" / "2.png").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(type(elastic.encoder()), "preprocess", None)  # any use would fail
        report = albums.ingest([tmp_path / "renamed", photos], delete=True)
    assert (counts(report), report.gone) == ((1, 9, 0, 2), 1)  # the copy; the moved; bad.png, here and there
    after = ids()
    copies = {after.pop("2.png"), after.pop("copy.png")}
    assert copies == {before.pop("2.png"), 12}
    assert after == before
    assert albums.verify() == []
    assert counts(albums.ingest([tmp_path / "renamed", tmp_path / "more"], delete=True)) == (0, 11, 0, 1)


def test_without_delete_a_moved_picture_is_another_one_with_the_same_embedding(albums, tmp_path, photos, elastic):
    photos.rename(tmp_path / "renamed")
    spare = Broken(elastic, lambda embeddings: 0 * embeddings)  # would be refused
    assert counts(albums.ingest(tmp_path / "renamed", encoder=spare)) == (9, 0, 0, 1)
    assert albums.info().items == 19
    assert albums.verify() == []


def test_a_picture_renamed_over_another_one_takes_that_ones_place(index, photos, elastic, picture):
    third, path = id_of(index.path, elastic, picture(3))
    (photos / "5.png").replace(path)
    assert counts(index.ingest(photos, delete=True)) == (1, 8, 1, 0)
    assert id_of(index.path, elastic, picture(5)) == (third, path)
    assert (index.info().items, index.verify()) == (9, [])


def test_the_encoder_is_loaded_only_when_a_picture_must_be_read(index, photos, picture, elastic, monkeypatch):
    def load(*_, **__):
        loaded.append(1)
        return elastic

    loaded = []
    monkeypatch.setattr("retrieval.index.load_encoder", load)
    assert counts(Index.open(index.path).ingest(photos)) == (0, 10, 0, 0)
    assert loaded == []
    (photos / "new.png").write_bytes(picture(50))
    again = Index.open(index.path)
    assert counts(again.ingest(photos)) == (1, 10, 0, 0)
    (photos / "newer.png").write_bytes(picture(51))
    assert counts(again.ingest(photos)) == (1, 11, 0, 0)
    assert loaded == [1]


def test_a_skipped_file_that_is_gone_is_forgotten_but_is_no_deleted_picture(index, photos):
    (photos / "sub" / "empty.jpg").touch()
    index.ingest(photos)
    (photos / "sub").rename(photos / "moved")
    assert counts(index.ingest(photos, delete=True)) == (0, 10, 0, 1)
    assert [file.path for file in index.info().skipped] == [photos / "moved" / "empty.jpg"]
    (photos / "moved" / "empty.jpg").unlink()
    assert counts(index.ingest(photos, delete=True)) == (0, 10, 0, 0)
    assert index.info().skipped == ()


def test_ids_are_never_given_twice(index, photos, elastic, picture):
    (photos / "sub" / "9.png").unlink()
    index.ingest(photos, delete=True)
    (photos / "new.png").write_bytes(picture(50))
    index.ingest(photos)
    assert id_of(index.path, elastic, picture(50))[0] == 10


def test_an_emptied_folder_is_refused_rather_than_forgotten(index, photos):
    for path in photos.rglob("*.png"):
        path.unlink()
    with pytest.raises(IngestError, match="holds no pictures"):
        index.ingest(photos, delete=True)
    assert index.info().items == 10


def test_bad_files_are_skipped_counted_listed_and_not_decoded_again(tmp_path, photos, elastic, picture, monkeypatch):
    (photos / "a-text.jpg").write_text("no picture")
    (photos / "b-empty.png").touch()
    (photos / "c-cut.png").write_bytes(picture(1)[:-60])
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    expected = {
        "a-text.jpg": "not a picture in a supported format",
        "b-empty.png": "the file is empty",
        "c-cut.png": "damaged picture (image file is truncated",
    }
    listed = {file.path.name: file.reason for file in index.info().skipped}
    assert listed.keys() == expected.keys()
    assert all(listed[name].startswith(reason) for name, reason in expected.items())
    monkeypatch.setattr(Loader, "load", None)  # any read would fail
    report = index.ingest(photos)
    assert counts(report) == (0, 10, 0, 3)
    assert {file.path.name: file.reason for file in report.skipped} == listed
    assert index.info().items == 10
    assert index.verify() == []


def test_a_repaired_file_is_taken_and_a_broken_one_is_no_longer_found(tmp_path, photos, elastic, picture):
    (photos / "bad.png").write_text("no picture")
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    (photos / "bad.png").write_bytes(picture(60))
    (photos / "2.png").write_text("broken now")
    assert counts(index.ingest(photos)) == (1, 9, 0, 1)
    assert id_of(index.path, elastic, picture(60))[1] == photos / "bad.png"
    hits = Retriever.open(index.path, encoder=elastic).search(picture(2), k=99)
    assert photos / "2.png" not in {hit.path for hit in hits}
    assert index.verify() == []


def test_what_could_not_be_read_is_listed_but_tried_again(tmp_path, photos, elastic, monkeypatch):
    def refuse(loader, task):
        if task.path == b"3.png":
            monkeypatch.setattr(Loader, "load", load)
            (photos / "3.png").rename(photos / ".away")  # vanishes between listing and reading
        return load(loader, task)

    load = Loader.load
    monkeypatch.setattr(Loader, "load", refuse)
    index = Index.create(tmp_path / "i", encoder=elastic)
    report = index.ingest(photos)
    assert [(file.path.name, file.reason) for file in report.skipped] == [("3.png", "no such file")]
    assert index.info().skipped == ()
    (photos / ".away").rename(photos / "3.png")
    assert counts(index.ingest(photos)) == (1, 9, 0, 0)


def test_a_picture_dated_after_what_64_bits_of_nanoseconds_hold_is_indexed_once(tmp_path, photos, elastic):
    os.utime(photos / "0.png", (99_999_999_999, 99_999_999_999))  # the year 5138
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    report = index.ingest(photos)
    assert (report.indexed, report.unchanged) == (0, 10)


def test_pipes_and_broken_links_do_not_stop_a_run(tmp_path, photos, elastic):
    os.mkfifo(photos / "pipe.png")
    (photos / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(photos / "sub" / "unnamed.png")
    os.mkfifo(photos / "no-picture-by-its-name")
    index = Index.create(tmp_path / "i", encoder=elastic)
    report = index.ingest([photos, photos / "pipe.png"])
    assert counts(report)[:3] == (10, 0, 0)
    assert {file.path.name: file.reason for file in report.skipped} == {
        "broken.png": "no such file",
        "pipe.png": "not a regular file",
        "unnamed.png": "not a regular file",
    }
    assert {file.path.name for file in index.info().skipped} == {"pipe.png", "unnamed.png"}  # files that are there


def test_a_picture_that_cannot_be_read_is_kept_with_its_reason_until_it_can(tmp_path, photos, elastic, picture):
    (photos / "loop.png").symlink_to(photos / "loop.png")
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    (kept,) = index.info().skipped
    assert (kept.path.name, index.verify()) == ("loop.png", [])
    generation = index.generation
    assert counts(index.ingest(photos)) == (0, 10, 0, 1)  # it was tried again
    assert index.generation == generation
    (photos / "loop.png").unlink()
    os.mkfifo(photos / "loop.png")
    index.ingest(photos)
    assert [file.reason for file in index.info().skipped] == ["not a regular file"]
    (photos / "loop.png").unlink()
    (photos / "loop.png").write_bytes(picture(50))
    assert counts(index.ingest(photos)) == (1, 10, 0, 0)
    assert (index.info().items, index.info().skipped, index.verify()) == (11, (), [])
    assert id_of(index.path, elastic, picture(50))[0] == 0  # it had one since it was skipped, before all that were read


def test_a_picture_that_cannot_be_read_any_more_is_found_as_it_was(tmp_path, photos, elastic, picture):
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    (photos / "3.png").unlink()
    os.mkfifo(photos / "3.png")
    assert counts(index.ingest(photos)) == (0, 9, 0, 1)
    assert (index.info().items, index.info().skipped) == (10, ())
    assert id_of(index.path, elastic, picture(3))[1] == photos / "3.png"


def test_names_with_newlines_and_undecodable_bytes_are_kept(tmp_path, elastic, picture):
    folder = tmp_path / os.fsdecode(b"bad-\xff")
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"new\nline.png", b"\xfe\xfd.png", "grüße.png".encode())]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(picture(seed))
    index = Index.build(folder, encoder=elastic, path=folder / "i")
    for seed, name in enumerate(names):
        assert id_of(index.path, elastic, picture(seed))[1] == folder / name
    assert counts(index.ingest(str(folder))) == (0, 3, 0, 0)
    assert index.verify() == []


def test_the_same_content_twice_is_two_items_in_id_order(tmp_path, photos, elastic, picture):
    (photos / "copy.png").write_bytes(picture(0))
    Index.build(photos, encoder=elastic, path=tmp_path / "i")
    first, second = Retriever.open(tmp_path / "i", encoder=elastic).search(picture(0), k=2)
    assert first.score == second.score
    assert first.id < second.id
    assert {first.path.name, second.path.name} == {"0.png", "copy.png"}


def test_items_are_where_the_format_says(index):
    [segment] = (index.path / "segments").iterdir()
    assert (segment / "embeddings.f32").stat().st_size == 10 * 16 * 4
    rows = sqlite3.connect(segment / "items.sqlite").execute("SELECT path, width, height, status, row FROM items")
    assert rows.fetchmany(2) == [(b"0.png", 12, 10, "ok", 0), (b"1.png", 12, 10, "ok", 1)]
    rows.connection.close()


def test_an_encoder_of_another_space_is_refused_by_name(index, photos, elastic):
    with pytest.raises(EncoderMismatchError, match=r"aaaaaaaaaaaa.*555555555555") as caught:
        index.ingest(photos, encoder=elastic.in_another_space())
    assert "\n" not in str(caught.value)


@dataclass
class Broken:
    """The fake encoder, except for what it returns."""

    elastic: object
    spoil: object

    def __getattr__(self, name):
        return getattr(self.elastic, name)

    def encoder(self, spec=None):
        inner, spoil = self.elastic.encoder(spec), self.spoil

        class Encoder(type(inner)):
            def encode(self, pixels):
                return spoil(super().encode(pixels))

        return Encoder(inner.spec, inner.space_id)


def nan_in_row_three(embeddings):
    embeddings[3] = np.nan
    return embeddings


def test_a_picture_without_a_finite_embedding_is_skipped_and_listed(tmp_path, photos, elastic):
    index = Index.create(tmp_path / "i", encoder=elastic)
    report = index.ingest(photos, encoder=Broken(elastic, nan_in_row_three))
    assert counts(report) == (9, 0, 0, 1)
    assert report.skipped[0].path.name == "3.png"
    assert index.verify() == []


def test_embeddings_of_another_shape_are_refused(tmp_path, photos, elastic):
    index = Index.create(tmp_path / "i", encoder=elastic)
    with pytest.raises(EmbeddingError, match=r"float32\(10, 15\) instead of float32\(10, 16\)"):
        index.ingest(photos, encoder=Broken(elastic, lambda embeddings: embeddings[:, :15]))


def test_progress_counts_every_file_once(tmp_path, photos, elastic):
    (photos / "bad.png").touch()
    events = []
    Index.build(photos, encoder=elastic, path=tmp_path / "i", progress=events.append)
    assert (events[-1].stage, events[-1].done, events[-1].total) == ("index", 11, 11)
    assert events[-1].note.endswith("/s, 1 skipped")
    events.clear()
    Index.open(tmp_path / "i").ingest(photos, encoder=elastic, progress=events.append)
    assert events[-1].note == "1 skipped"  # a speed of 0 would tell nothing


def test_what_is_known_is_shown_before_a_new_picture_is_read(index, photos, elastic, picture, monkeypatch):
    def load(loader, task):
        shown.append(events[-1].done if events else None)
        return Loader.load(loader, task)

    events, shown = [], []
    (photos / "sub" / "new.png").write_bytes(picture(50))
    monkeypatch.setattr(retrieval.pipeline, "Loader", type("Loader", (Loader,), {"load": load}))
    index.ingest(photos, encoder=elastic, progress=events.append)
    assert shown == [10]


def test_a_long_run_publishes_as_it_goes_and_shares_segments(tmp_path, photos, elastic, monkeypatch):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    assert index.generation == 4
    assert len(list((index.path / "segments").iterdir())) == 3
    assert index.info().items == 10
    assert index.verify() == []


def fail_on(embedding, error):
    def spoil(embeddings):
        if np.isclose(embeddings, embedding).all(axis=1).any():
            raise error
        return embeddings

    return spoil


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_whatever_ends_a_run_what_is_complete_is_kept(tmp_path, photos, elastic, monkeypatch, error):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "AHEAD", 4)
    index = Index.create(tmp_path / "i", encoder=elastic)
    fifth = elastic.encoder().embed([photos / "4.png"])
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        index.ingest(photos, encoder=Broken(elastic, fail_on(fifth, error)))
    reopened = Index.open(index.path)
    assert reopened.info().items == 4
    assert reopened.verify() == []
    assert counts(reopened.ingest(photos, encoder=elastic)) == (6, 4, 0, 0)
    assert reopened.verify() == []


def test_an_interrupt_in_the_last_publication_loses_nothing_that_was_encoded(tmp_path, photos, elastic, monkeypatch):
    index, real, calls = Index.create(tmp_path / "i", encoder=elastic), retrieval.writer.write_items, []

    def interrupted_once(path, items):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(path, items)

    monkeypatch.setattr(retrieval.writer, "write_items", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        index.ingest(photos)
    assert Index.open(index.path).info().items == 10


def test_an_index_that_would_name_too_many_folders_is_not_published(index, tmp_path, elastic, picture, monkeypatch):
    before = index.info()
    monkeypatch.setattr(retrieval.manifest, "MOST", 3000)
    for number in range(90):
        (tmp_path / "shop" / str(number)).mkdir(parents=True)
        (tmp_path / "shop" / str(number) / "main.png").write_bytes(picture(200 + number))
    with pytest.raises(
        DiskRefusalError, match=r"it would name 91 folders of pictures\); index the folders around them"
    ):
        index.ingest([tmp_path / "shop" / str(number) / "main.png" for number in range(90)], encoder=elastic)
    assert Index.open(index.path).info() == before
    assert Index.open(index.path).verify() == []
    assert index.ingest(tmp_path / "shop", encoder=elastic).indexed == 90


@pytest.mark.parametrize("name", ["segments/mine", "upgrade", "cache/a/b", "deletions/x"])
def test_no_index_is_made_among_the_files_of_another(index, elastic, name):
    with pytest.raises(IndexExistsError, match="lies among the files of the index"):
        Index.create(index.path / name, encoder=elastic)
    assert Index.create(index.path.parent / "other" / name, encoder=elastic).info().items == 0


def test_files_and_items_are_read_in_pages(index, photos, elastic, monkeypatch):
    for module in (retrieval.found_files, retrieval.known):
        monkeypatch.setattr(module, "_PAGE", 3)
    assert counts(index.ingest(photos)) == (0, 10, 0, 0)
    shutil.rmtree(photos / "sub")
    left = len(list(photos.glob("*.png")))
    assert counts(index.ingest(photos, delete=True)) == (0, left, 10 - left, 0)


def test_contents_whose_sha256_end_alike_are_told_apart(index, tmp_path, elastic, picture, monkeypatch):
    monkeypatch.setattr(retrieval.known, "_ENDING", 1)
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(300 + number))
    assert index.ingest([tmp_path / f"{number}.png" for number in range(40)], encoder=elastic).indexed == 40
    assert len(set(embeddings_of(index))) == 50


def embeddings_of(index):
    return [row.tobytes() for segment in index._snapshot.segments for row in segment.embeddings()]


def test_the_space_of_an_encoder_is_asked_for_once_since_it_is_a_hash_of_all_weights(elastic, tmp_path):
    asked = []

    class Hashing(type(elastic.encoder("S"))):
        @property
        def space_id(self):
            asked.append(self)
            return elastic.space_id

    one = Hashing.__new__(Hashing)
    check_query_encoder(one, describe(elastic), index=tmp_path)
    assert len(asked) == 1
