"""Pictures from lists, tar shards, Parquet tables and stores: what is read, kept, told and forgotten."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
import traceback
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from matvit.errors import ImageError, MissingExtraError
from retrieval import Index, IngestError, Retriever, SearchError
from retrieval.files import exhausted
from retrieval.lists import _value
from retrieval.locations import (
    location,
    open_picture,
    open_regular,
    read_picture,
    remote_status,
    split_member,
    status_of,
)
from retrieval.manifest import read_pointer
from retrieval.metadata import from_json
from retrieval.shards import Table
from retrieval.sources import find_files


def metadata(index):
    found = {}
    for _, item in index._snapshot.live_items():
        found[os.fsdecode(item.path)] = json.loads(item.metadata)
    return found


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_table(path, columns, **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def build(tmp_path, elastic):
    return lambda images: Index.build(images, encoder=elastic, path=tmp_path / "i")


def test_a_text_list_names_pictures_relative_to_itself(photos, build):
    (photos / "list.txt").write_bytes(b"1.png\r\n\nsub/7.png\n" + os.fsencode(photos / "2.png") + b"\ngone.png\n")
    index = build(photos / "list.txt")
    assert metadata(index).keys() == {"1.png", "2.png", "sub/7.png"}
    [missing] = find_files(photos / "list.txt").missing
    assert (missing.path, missing.reason) == (photos / "gone.png", "no such file (line 5 of list.txt)")


@pytest.mark.parametrize("fsspec", [True, False])
def test_a_line_that_names_a_store_that_is_not_known_is_skipped_like_any_other(photos, build, monkeypatch, fsspec):
    if fsspec:
        pytest.importorskip("fsspec")
    else:
        monkeypatch.setitem(sys.modules, "fsspec.core", None)
    (photos / "list.txt").write_text("1.png\n2.png\nweird://x/a.jpg\n3.png\n")
    index = build(photos / "list.txt")
    assert metadata(index).keys() == {"1.png", "2.png", "3.png"}
    report = index.ingest(photos / "list.txt")
    [skipped] = report.skipped
    assert (report.unchanged, location(skipped.path)) == (3, "weird://x/a.jpg")
    assert ("Protocol not known: weird" if fsspec else "run: pip install") in skipped.reason


def test_a_csv_list_gives_metadata_and_numbers_are_numbers(photos, build):
    (photos / "list.csv").write_text("label,path,price,code\ncat,1.png,2.5,007\ndog,2.png,3,12\n,3.png,,\n")
    index = build([photos, photos / "list.csv"])  # whichever comes first
    found = metadata(index)
    assert found["1.png"] == {"label": "cat", "price": 2.5, "code": "007"}
    assert found["2.png"] == {"label": "dog", "price": 3, "code": "12"}
    assert (found["3.png"], found["4.png"], len(found)) == ({}, {}, 10)


def test_a_list_whose_cells_were_emptied_takes_back_what_it_said(photos, build):
    (photos / "list.csv").write_text("path,price\n0.png,3\n1.png,4\n")
    index = build(photos / "list.csv")
    (photos / "list.csv").write_text("path,price\n0.png,\n1.png,5\n")
    index.ingest(photos / "list.csv")
    assert metadata(index) == {"0.png": {}, "1.png": {"price": 5}}


def test_a_list_in_another_encoding_is_told_and_a_path_may_be_any_bytes(photos, build):
    (photos / "1.png").rename(photos / os.fsdecode(b"\xe9.png"))
    (photos / "list.csv").write_bytes(b"path,label\n\xe9.png,cat\n")
    assert len(Retriever.open(build(photos / "list.csv").path)) == 1
    (photos / "list.csv").write_bytes(b"path,label\n2.png,caf\xe9\n")
    with pytest.raises(IngestError, match="line 2 is no UTF-8; save the list as UTF-8"):
        build(photos / "list.csv")


def test_a_list_that_grows_while_it_is_read_may_have_texts_among_its_numbers():
    assert [_value(cell, numeric=True) for cell in ("1", "1.5", "n/a")] == [1, 1.5, "n/a"]


def test_a_number_that_is_too_large_for_one_is_text(photos, build):
    (photos / "list.csv").write_text("path,size\n1.png,1e400\n2.png,3\n")
    found = metadata(build(photos / "list.csv"))
    assert (found["1.png"], found["2.png"]) == ({"size": "1e400"}, {"size": "3"})


def test_a_range_finds_what_one_list_gives_as_numbers_and_another_as_text(photos, build, elastic):
    (photos / "a.csv").write_text("path,year\n0.png,2019\n1.png,2021\n")
    (photos / "b.csv").write_text("path,year\n2.png,2020\n3.png,unknown\n4.png,02022\n5.png,-1\n")
    retriever = Retriever.open(build([photos / "a.csv", photos / "b.csv"]).path, encoder=elastic)

    def found(**limits):
        return sorted(int(hit.path.stem) for hit in retriever.search(photos / "0.png", k=None, where=limits))

    assert found(year={">=": 2020}) == [1, 2, 4]
    assert found(year={"<": 2020}) == [0, 5]
    assert found(year={">=": "2020"}) == [1, 2, 3]  # by their letters


def test_a_range_is_exact_for_long_whole_numbers_that_are_kept_as_text(photos, build, elastic):
    rows = ["0.png,9007199254740992", "1.png,9007199254740993", "2.png,none", f"3.png,{'9' * 5000}", "4.png,1.5e300"]
    (photos / "list.csv").write_text("\n".join(["path,code", *rows]))
    retriever = Retriever.open(build(photos / "list.csv").path, encoder=elastic)
    hits = retriever.search(photos / "0.png", k=None, where={"code": {">=": 9007199254740993}})
    assert sorted(int(hit.path.stem) for hit in hits) == [1, 3, 4]


def test_a_lists_new_metadata_are_kept_without_reading_the_pictures(photos, build, elastic, monkeypatch):
    (photos / "list.csv").write_text("path,label\n1.png,cat\n")
    index = build([photos, photos / "list.csv"])
    (photos / "list.csv").write_text("path,label\n1.png,dog\n")
    monkeypatch.setattr(type(elastic.encoder()), "preprocess", None)  # any use would fail
    report = index.ingest(photos / "list.csv")
    assert (report.indexed, report.unchanged, metadata(index)["1.png"]) == (0, 1, {"label": "dog"})
    index.ingest(photos)  # says nothing of labels
    assert metadata(index)["1.png"] == {"label": "dog"}
    assert index.verify() == []


def test_a_parquet_list_gives_metadata(photos, build):
    write_table(
        photos / "list.parquet", {"file_name": ["1.png", "2.png"], "year": [1999, None], "x": [float("nan"), 1.0]}
    )
    assert metadata(build(photos / "list.parquet")) == {"1.png": {"year": 1999}, "2.png": {"x": 1.0}}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("l.csv", "a,b\n1,2\n", "the list has no path column, only: a, b; give it a column 'path'"),
        ("l.csv", "path,b\n1.png,2,3\n", "line 2 has more cells than the first line"),
        ("l.csv", f"path,b\n1.png,{'x' * 131_073}\n", "line 2 has a cell of more than 131,072 characters; shorten it"),
        ("l.csv", "path,b,path\n1.png,2,3.png\n", "2 columns are named 'path'; rename or leave out all but one"),
        ("l.csv", 'path,b\na.png,"dog\nb.png,cat\nc.png,cat\n', "what begins in line 2 is no CSV (unexpected"),
        ("l.csv", 'path,b\na.png,"dog" x\n', "what begins in line 2 is no CSV ("),
        ("l.csv", "", "the list names no picture that is there"),
        ("l.txt", "nothing\n", "the list names no picture that is there ("),
        ("l.parquet", "no parquet", "is no readable parquet file"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(tmp_path, name, content, sentence):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(IngestError) as caught:
        find_files(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_byte_order_mark_is_no_part_of_a_list_and_utf_16_is_told(photos, build, name):
    text = "1.png\n2.png\n" if name == "list.txt" else "path\n1.png\n2.png\n"
    (photos / name).write_text(text, encoding="utf-8-sig")
    assert metadata(build(photos / name)).keys() == {"1.png", "2.png"}
    (photos / name).write_text(text, encoding="utf-16")
    with pytest.raises(IngestError, match=rf"{name}: the list is UTF-16; save it as UTF-8"):
        find_files(photos / name)


def test_a_line_with_nul_is_told(photos):
    (photos / "list.txt").write_bytes(b"1.png\n2\0.png\n")
    [skipped] = find_files(photos / "list.txt").skipped
    assert skipped.reason == "cannot be read (no file can have this name) (line 2 of list.txt)"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.parquet", "a.tar"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_that_is_named_like_a_list_or_shard_is_told(build, tmp_path, photos, name, kind):
    pytest.importorskip("pyarrow")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(IngestError, match="not a regular file"):
        build(tmp_path / name)
    if not name.endswith((".txt", ".csv")):
        [skipped] = build([photos, tmp_path / name]).ingest([photos, tmp_path / name]).skipped
        assert "not a regular file" in skipped.reason


def test_names_that_no_file_can_have_are_skipped_by_line_and_long_numbers_are_text(photos, build):
    (photos / "list.csv").write_bytes(b"path,n\n1.png," + b"1" * 5000 + b"\na\0b.png,2\n")
    assert metadata(build(photos / "list.csv")) == {"1.png": {"n": "1" * 5000}}
    [skipped] = find_files(photos / "list.csv").skipped
    assert skipped.reason == "cannot be read (no file can have this name) (line 3 of list.csv)"


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_one_sentence(build, name):
    with pytest.raises(IngestError, match="no file can have this name"):
        build([name])


@pytest.fixture
def shard(tmp_path, picture):
    members = {
        "./a/0.json": b'{"price": 3}',
        "./a/0.png": picture(0),
        "./a/0.cls": b"7",
        "./a/1.png": picture(1),
        "./a/1.txt": "gr\u00fcn".encode(),
        "./a/2.bin": b"something else",
    }
    return write_tar(tmp_path / "shard.tar", members)


def test_a_tar_shard_gives_pictures_with_their_groups_metadata(shard, build, elastic, picture):
    index = build(shard)
    assert metadata(index) == {
        "shard.tar#a/0.png": {"price": 3, "label": 7},
        "shard.tar#a/1.png": {"caption": "gr\u00fcn"},
    }
    retriever = Retriever.open(index.path, encoder=elastic)
    [hit] = retriever.search(picture(1), k=1)
    assert str(hit.path) == f"{shard}#a/1.png"
    assert retriever.read_picture(hit.id) == read_picture(hit.path) == picture(1)
    with pytest.raises(SearchError, match="no picture with id 99"):
        retriever.read_picture(99)
    shard.unlink()
    with pytest.raises(ImageError, match="no such file"):
        retriever.read_picture(hit.id)


def test_a_shards_picture_has_the_folder_inside_the_shard_for_its_label(tmp_path, picture, build, elastic):
    (tmp_path / "shop").mkdir()
    names = ["top.png", "cat/0.png", "cat/old/1.png"]
    write_tar(tmp_path / "shop" / "shard.tar", {name: picture(seed) for seed, name in enumerate(names)})
    (tmp_path / "shop" / "plain.png").write_bytes(picture(9))
    index = build([tmp_path, tmp_path / "shop" / "shard.tar"])
    hits = Retriever.open(index.path, encoder=elastic).search(picture(0))
    assert {hit.path.name: hit.metadata for hit in hits} == {
        "shard.tar#top.png": {},
        "0.png": {"label": "cat"},
        "1.png": {"label": "cat/old"},
        "plain.png": {"label": "shop"},
    }


def labels(index):
    snapshot = index._snapshot
    return {
        snapshot.full_path(item.place).name: from_json(item.metadata, item.path).get("label")
        for _, item in snapshot.live_items()
    }


@pytest.mark.parametrize("folder", ["photos", "photos/*", "photos/s*/**/*.png"])
def test_a_named_picture_or_shard_beside_a_folder_does_not_change_the_labels(tmp_path, photos, picture, build, folder):
    (tmp_path / "one.png").write_bytes(picture(20))
    write_tar(tmp_path / "shard.tar", {"cat/a.png": picture(21)})
    named = [tmp_path / folder, tmp_path / "one.png", tmp_path / "shard.tar"]
    index = build(named)
    found = labels(index)
    assert {name: label for name, label in found.items() if label} == {
        **dict.fromkeys(["7.png", "8.png", "9.png"], "sub"),
        "a.png": "cat",
    }
    index.ingest(photos)
    for images in (tmp_path, named[1:], named):
        assert index.ingest(images, delete=True).indexed == 0
    assert {name: labels(index)[name] for name in found} == found


def test_an_index_that_holds_a_folder_by_the_one_around_it_goes_on_so(tmp_path, photos, build):
    index = build(tmp_path)
    before = metadata(index).keys()
    report = index.ingest([photos, photos / "sub"])
    assert (report.indexed, report.unchanged) == (0, 10)
    assert metadata(index).keys() == before >= {"photos/0.png", "photos/sub/7.png"}


def test_hidden_members_and_hidden_folders_in_a_shard_are_left_out(tmp_path, picture, build):
    members = {"./a.png": picture(0), ".b.png": picture(1), "x/.thumbs/c.png": picture(2), "./x/._d.json": b"\0"}
    index = build(write_tar(tmp_path / "s.tar", members | {"x/d.png": picture(3)}))
    assert metadata(index) == {"s.tar#a.png": {}, "s.tar#x/d.png": {}}
    assert index.info().skipped == ()


def test_a_shard_that_did_not_change_is_not_read_and_a_changed_one_by_its_members_content(
    shard, build, picture, elastic, monkeypatch
):
    index = build(shard)
    with monkeypatch.context() as patch:
        patch.setattr("retrieval.loading.Loader.load", None)  # any use would fail
        assert index.ingest(shard).unchanged == 2
    write_tar(shard, {"new.png": picture(5), "a/1.png": picture(1), "a/1.cls": b"dog"})
    report = index.ingest(shard, delete=True)
    assert (report.indexed, report.unchanged, report.deleted) == (1, 1, 1)
    assert metadata(index) == {"shard.tar#a/1.png": {"label": "dog"}, "shard.tar#new.png": {}}
    assert index.verify() == []


@pytest.mark.parametrize("cut", [300, 700, 2100])
def test_a_damaged_shard_is_told_and_what_comes_before_is_taken(shard, photos, build, cut):
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-cut] if cut == 300 else bytes(data[:cut]))
    index = build([photos / "1.png", shard])
    report = index.ingest([photos / "1.png", shard])
    assert index.verify() == []
    if cut != 300:  # or else only padding is lost
        assert [file.reason.startswith(("damaged tar shard", "damaged picture")) for file in report.skipped] == [True]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(shard, build):
    data = bytearray(shard.read_bytes())
    place = data.index(b"./a/1.png")
    data[place + 150] ^= 0xFF  # its checksum
    shard.write_bytes(data)
    index = build(shard)
    [skipped] = index.ingest(shard).skipped
    assert (skipped.path, skipped.reason) == (shard, f"damaged tar shard (at byte {place})")
    assert index.info().items == 1


@pytest.mark.parametrize("left", ["zeros", "nothing"])
def test_a_shard_or_table_that_lost_all_its_pictures_is_not_forgotten(shard, tmp_path, picture, build, left):
    pa = pytest.importorskip("pyarrow")
    table = write_table(tmp_path / "rows.parquet", {"image": [picture(7), picture(8)]})
    index = build([shard, table])
    before = len(Retriever.open(index.path))
    if left == "zeros":
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        write_tar(shard, {})
    write_table(table, {"image": pa.array([], pa.binary())})
    report = index.ingest([shard, table], delete=True)
    assert (report.deleted, report.gone) == (0, before)
    assert len(Retriever.open(index.path)) == before
    assert index.delete([shard, table]) == before


def test_what_lies_behind_the_end_of_a_shard_is_told(tmp_path, picture, build):
    one, two = (write_tar(tmp_path / f"{name}.tar", {f"{name}.png": picture(name)}) for name in (1, 2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    [skipped] = build(joined).ingest(joined).skipped
    assert skipped.path == joined
    assert skipped.reason.startswith("holds more behind its end")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_that_never_come_to_a_member_or_claim_any_size_are_damage(tmp_path, picture, photos, build, kind):
    def header(size):
        entry = tarfile.TarInfo("x")
        entry.type, entry.size = kind, size
        return entry.tobuf(tarfile.GNU_FORMAT)

    whole = write_tar(tmp_path / "whole.tar", {"a.png": picture(50)}).read_bytes()
    index = build(photos)
    for name, content in (("many", (header(4) + b"x\0\0\0".ljust(512, b"\0")) * 3000), ("large", header(2**40))):
        (tmp_path / f"{name}.tar").write_bytes(content + whole)
        [skipped] = index.ingest(tmp_path / f"{name}.tar").skipped
        assert skipped.reason.startswith("damaged tar shard")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_told_from_a_damaged_one(tmp_path, picture, photos, build, kind):
    for name in ("s.tar", f"s.tar.{kind}"):
        with tarfile.open(tmp_path / name, f"w:{kind}") as tar:
            entry = tarfile.TarInfo("a.png")
            entry.size = len(picture(1))
            tar.addfile(entry, io.BytesIO(picture(1)))
    report = build(photos).ingest([tmp_path / "s.tar", tmp_path / f"s.tar.{kind}"])
    assert [file.reason for file in report.skipped] == [
        "a compressed tar; unpack it to a plain .tar",
        "a compressed archive; unpack it, for example to a plain .tar",
    ]


def test_members_that_lead_out_come_twice_or_have_bad_metadata_are_skipped_with_their_reason(tmp_path, picture, build):
    bad = {"ok.png": picture(1), "x/../../up.png": picture(2), "j.json": b"{", "j.png": picture(3)}
    for levels in (100, 700, 30_000):
        bad |= {f"{levels}.json": b'{"x": %s1%s}' % (b"[" * levels, b"]" * levels), f"{levels}.png": picture(levels)}
    path = write_tar(tmp_path / "s.tar", bad)
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo("ok.png")
        tar.addfile(entry, io.BytesIO())
    index = build(path)
    assert {location(file.path).rpartition("#")[2]: file.reason for file in index.ingest(path).skipped} == {
        "x/../../up.png": "its name leads out of the shard",
        "ok.png": "the shard has two members of this name",
        "j.png": "its metadata in j.json cannot be read",
        "100.png": "its metadata is nested more than 100 levels deep",
        "700.png": "its metadata is nested more than 100 levels deep",
        "30000.png": "its metadata in 30000.json cannot be read",
    }
    assert metadata(index) == {"s.tar#ok.png": {}}


def test_a_parquet_table_of_pictures_gives_rows_and_class_names(tmp_path, picture, build, elastic):
    pa = pytest.importorskip("pyarrow")
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(5)] + [None, {"bytes": b"text", "path": "x"}]
    table = pa.table({"image": pa.array(rows, kind), "label": [0, 1, 1, 0, 0, 1, 1], "n": list(range(7))})
    table = table.replace_schema_metadata({b"huggingface": json.dumps(names).encode()})
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    pq.write_table(table, path, row_group_size=2)
    index = build(path)
    report = index.ingest(path)
    assert (report.unchanged, [file.reason for file in report.skipped]) == (
        5,
        ["the row holds no bytes of a picture", "not a picture in a supported format"],
    )
    assert metadata(index)["train.parquet#1"] == {"label": "dog", "n": 1}
    retriever = Retriever.open(index.path, encoder=elastic)
    [hit] = retriever.search(picture(3), k=1)
    assert str(hit.path) == f"{path}#3"
    assert retriever.read_picture(hit.id) == picture(3)


@pytest.mark.parametrize(
    "columns",
    [
        {"mask": "other", "image": "plain"},
        {"hash": "other", "image": "plain", "path": "text"},
        {"thumb": "other", "image": "structure"},
        {"thumb": "other", "photo": "structure"},
        {"words": "words", "photo": "plain"},
    ],
)
def test_the_pictures_of_a_table_are_told_from_other_bytes(tmp_path, picture, build, elastic, columns):
    pytest.importorskip("pyarrow")
    pictures = [picture(0), picture(1)]
    kinds = {
        "plain": pictures,
        "structure": [{"bytes": one, "path": "a.png"} for one in pictures],
        "other": [picture(5), picture(6)],
        "words": [{"bytes": "YQ==", "path": "a"}] * 2,
        "text": ["x", "y"],
    }
    table = write_table(tmp_path / "rows.parquet", {name: kinds[kind] for name, kind in columns.items()})
    retriever = Retriever.open(build(table).path, encoder=elastic)
    assert [retriever.read_picture(hit.id) for hit in retriever.search(pictures[0])] == pictures


def test_a_table_with_paths_and_hashes_is_a_list(photos, build):
    pytest.importorskip("pyarrow")
    write_table(photos / "list.parquet", {"hash": [b"a", b"b"], "path": ["1.png", "2.png"]})
    assert len(Retriever.open(build(photos / "list.parquet").path)) == 2


def test_a_time_that_python_does_not_have_is_left_out_and_its_picture_taken(tmp_path, picture, build):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    far = {
        "date": pa.array([10**7, 0], pa.date32()),
        "time": pa.array([2**60, 0], pa.timestamp("us")),
        "wait": pa.array([2**62, 0], pa.duration("s")),
    }
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "n": [1, 2], **far}), tmp_path / "far.parquet")
    assert metadata(build(tmp_path / "far.parquet")) == {
        "far.parquet#0": {"n": 1},
        "far.parquet#1": {"n": 2, "date": "1970-01-01", "time": "1970-01-01T00:00:00"},
    }


def test_a_shard_or_table_without_pictures_is_named(tmp_path, photos, build):
    images = pytest.importorskip("pyarrow").array([], "binary")
    table = write_table(tmp_path / "none.parquet", {"image": images})
    places = [write_tar(tmp_path / "none.tar", {"a.txt": b"x"}), table]
    for place in places:
        with pytest.raises(IngestError, match=rf"{place.name}: holds no pictures"):
            build(place)
    report = build(photos).ingest(places)
    assert sorted((file.path, file.reason) for file in report.skipped) == [
        (place, "holds no pictures") for place in sorted(places)
    ]


def test_pictures_that_are_links_in_a_shard_are_skipped_with_their_reason(tmp_path, picture, build):
    path = write_tar(tmp_path / "s.tar", {"0.png": picture(0)})
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("hard.png", tarfile.LNKTYPE),
            ("soft.png", tarfile.SYMTYPE),
            ("said.txt", tarfile.LNKTYPE),
            ("holes.png", tarfile.GNUTYPE_SPARSE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.png"
            tar.addfile(entry)
    index = build(path)
    assert sorted(location(file.path).rpartition("#")[2] for file in index.ingest(path).skipped) == [
        "hard.png",
        "holes.png",
        "soft.png",
    ]
    assert metadata(index) == {"s.tar#0.png": {}}


def test_a_table_whose_metadata_are_nested_too_deep_is_one_without_class_names(tmp_path, picture, build):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [picture(0)], "label": [1]})
    import pyarrow.parquet as pq

    pq.write_table(table.replace_schema_metadata({b"huggingface": b"[" * 100_000}), tmp_path / "train.parquet")
    assert metadata(build(tmp_path / "train.parquet"))["train.parquet#0"] == {"label": 1}


READ_TABLE = """
import re, sys
import pyarrow.parquet
from retrieval.shards import Table

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

table = Table(sys.argv[1])
before = most()
print(sum(len(member.data) for group, rows in enumerate(table.groups()) for member in table.members(group, rows.start)))
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("rows", "of_each", "size"), [(80, 10, 3_000_000), (30, 30, 8_000_000)])
def test_a_large_table_is_read_in_little_memory(tmp_path, rows, of_each, size):
    options = {"row_group_size": of_each, "use_dictionary": False, "write_batch_size": 1, "compression": "none"}
    table = write_table(tmp_path / "t.parquet", {"image": [os.urandom(size) for _ in range(rows)]}, **options)
    command = [sys.executable, "-c", READ_TABLE, str(table)]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    read, mebibytes = map(int, found.stdout.split())
    assert read == rows * size
    assert mebibytes < 130


def test_embedding_a_table_again_decodes_each_of_its_batches_once(tmp_path, picture, build, elastic, monkeypatch):
    path = write_table(tmp_path / "rows.parquet", {"image": [picture(n) for n in range(150)]}, row_group_size=100)
    index = build(path)
    import pyarrow.parquet as pq

    opened, read = [], []

    class Counted(pq.ParquetFile):
        def __init__(self, *arguments, **named):
            opened.append(1)
            super().__init__(*arguments, **named)

        def iter_batches(self, *arguments, **named):
            for batch in super().iter_batches(*arguments, **named):
                read.append(len(batch))
                yield batch

        def read_row_group(self, *arguments, **named):
            table = super().read_row_group(*arguments, **named)
            read.append(len(table))
            return table

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    assert index.upgrade(elastic.in_another_space()).embedded == 150
    assert (len(opened), sum(read)) == (1, 150)
    assert [read_picture(f"{path}#{row}") for row in (149, 3)] == [picture(149), picture(3)]
    for row in ("150", "x", "1" * 5000):
        with pytest.raises(ImageError, match="no such row"):
            read_picture(f"{path}#{row}")


def test_a_file_whose_name_looks_like_a_place_in_a_shard_is_itself(tmp_path, picture):
    (tmp_path / "a.tar#b.png").write_bytes(picture(1))
    assert split_member(str(tmp_path / "a.tar#b.png")) == (str(tmp_path / "a.tar#b.png"), None)
    assert read_picture(tmp_path / "a.tar#b.png") == picture(1)


def test_a_folder_may_be_named_like_a_store(tmp_path, picture, build, monkeypatch):
    (tmp_path / "ab:" / "c").mkdir(parents=True)
    (tmp_path / "ab:" / "c" / "1.png").write_bytes(picture(1))
    monkeypatch.chdir(tmp_path)
    assert list(Retriever.open(build("ab:/c").path).paths().values()) == [tmp_path / "ab:" / "c" / "1.png"]
    assert read_picture("ab:/c/1.png") == picture(1)


def test_a_folder_may_be_named_like_a_shard(tmp_path, picture, build):
    folder = tmp_path / "w" / "a.tar#b"
    folder.mkdir(parents=True)
    shard = write_tar(folder / "c.tar", {"1.png": picture(1), "d.tar#e.png": picture(2)})
    assert split_member(f"{shard}#d.tar#e.png") == (str(shard), "d.tar#e.png")
    index = build([tmp_path / "w", shard])
    assert index.ingest([tmp_path / "w", shard], delete=True).unchanged == 2
    assert sorted(map(read_picture, Retriever.open(index.path).paths().values())) == sorted([picture(1), picture(2)])
    shard.unlink()
    assert split_member(f"{shard}#1.png") == (str(shard), "1.png")
    assert split_member("/w/.tar#1.png") == ("/w/.tar", "1.png")


def test_a_url_in_a_list_that_looks_like_a_place_in_a_shard_is_one_bad_line(photos, build):
    pytest.importorskip("fsspec")
    (photos / "list.txt").write_text("1.png\nmemory://not/there.tar#y/z.png\n")
    index = build(photos / "list.txt")
    assert len(Retriever.open(index.path)) == 1


def test_a_picture_that_was_beside_a_table_and_is_gone_is_no_row_of_it(tmp_path, photos, picture, build):
    write_table(photos / "x.parquet", {"image": [picture(90)]})
    (photos / "x.parquet#a.png").write_bytes(picture(91))
    index = build(photos)
    (photos / "x.parquet#a.png").unlink()
    assert index.ingest(photos).gone == 1
    assert index.ingest(photos, delete=True).deleted == 1


def test_a_file_named_like_a_member_of_the_shard_beside_it_is_the_one_that_counts(tmp_path, picture, build):
    (tmp_path / "p").mkdir()
    shard = write_tar(tmp_path / "p" / "x.tar", {"y.png": picture(1), "z.png": picture(2)})
    (tmp_path / "p" / "x.tar#y.png").write_bytes(picture(3))
    index = build([tmp_path / "p", shard])
    (tmp_path / "p" / "x.tar#y.png").write_bytes(picture(4))
    report = index.ingest([tmp_path / "p", shard])
    assert (report.indexed, report.unchanged) == (1, 1)
    assert [file.reason for file in report.skipped] == ["a file beside the shard has this very name"]
    assert {read_picture(path) for path in Retriever.open(index.path).paths().values()} == {picture(4), picture(2)}


def test_a_sparse_header_that_is_cut_is_damage(tmp_path, picture, photos, build):
    shard = write_tar(tmp_path / "s.tar", {"ok.png": picture(60)})
    entry = tarfile.TarInfo("a.png")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = b"S", 1  # an old GNU sparse file, whose map goes on in the next block
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.write_bytes(shard.read_bytes()[: 512 + -(-len(picture(60)) // 512) * 512] + header)
    index = build([shard, photos])
    assert [file.reason for file in index.ingest([shard, photos]).skipped] == ["damaged tar shard"]
    assert index.info().items == 11


def test_a_table_that_claims_rows_without_end_is_damaged_where_they_end(tmp_path, picture, build, monkeypatch):
    table = write_table(tmp_path / "t.parquet", {"image": [picture(1), picture(2)]})
    monkeypatch.setattr(Table, "groups", lambda _: [range(10**12)])
    index = build(table)
    [skipped] = index.ingest(table).skipped
    assert (index.info().items, skipped.reason) == (2, "damaged parquet file (rows are missing)")


def test_metadata_that_are_lists_are_not_offered_to_ask_for(tmp_path, picture, build):
    data = json.dumps({"tags": ["a"], "price": 3}).encode()
    shard = write_tar(tmp_path / "s.tar", {"1.png": picture(1), "1.json": data})
    retriever = Retriever.open(build(shard).path)
    with pytest.raises(SearchError, match="'tags' holds lists or objects, which cannot be asked for"):
        retriever.search(0, where={"tags": "a"})
    with pytest.raises(SearchError, match=r"use one of: price$"):
        retriever.search(0, where={"tag": "a"})


@pytest.fixture
def store(picture):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/shop/sub/{number}.png", picture(number))
    memory.pipe("/shop/notes.md", b"no picture")
    yield memory
    memory.rm("/shop", recursive=True)


def test_a_store_is_read_changed_and_forgotten_like_a_folder(store, build, elastic, picture):
    index = build("memory://shop")
    retriever = Retriever.open(index.path, encoder=elastic)
    [hit] = retriever.search(picture(2), k=1)
    assert location(hit.path) == "memory://shop/sub/2.png"
    assert retriever.read_picture(hit.id) == picture(2)
    assert index.ingest("memory://shop").unchanged == 3
    store.pipe("/shop/sub/1.png", picture(9))
    store.rm("/shop/sub/0.png")
    report = index.ingest("memory://shop/sub/*.png", delete=True)
    assert (report.indexed, report.unchanged, report.deleted) == (1, 1, 1)
    assert index.verify() == []


def test_a_store_of_which_nothing_is_there_is_not_forgotten_beside_a_folder(store, build, photos):
    index = build([photos, "memory://shop"])
    for number in range(3):
        store.rm(f"/shop/sub/{number}.png")
    for named in ("memory://shop", "memory://shop/sub/*.png"):
        report = index.ingest([photos, named], delete=True)
        assert (report.deleted, report.gone, len(report.skipped)) == (0, 3, 1)
    assert index.info().items == 13


def test_a_url_that_answers_404_is_not_forgotten_beside_a_folder(build, photos, tmp_path, picture):
    pytest.importorskip("aiohttp")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "x.png").write_bytes(picture(20))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        index = build([photos, url])
        (tmp_path / "site" / "x.png").unlink()
        report = index.ingest([photos, url], delete=True)
    finally:
        server.shutdown()
        server.server_close()
    assert (report.deleted, report.gone, [location(file.path) for file in report.skipped]) == (0, 1, [url])
    assert index.info().items == 11


@pytest.mark.parametrize(("status", "deleted"), [(404, 1), (503, 0), (403, 0)])
def test_only_what_a_server_calls_gone_is_forgotten(store, build, picture, monkeypatch, status, deleted):
    aiohttp = pytest.importorskip("aiohttp")
    index = build("memory://shop")
    store.rm("/shop/sub/1.png")
    real = type(store).info

    def info(system, path, **named):
        if path.endswith("1.png"):
            raise FileNotFoundError(path) from aiohttp.ClientResponseError(None, (), status=status)
        return real(system, path, **named)

    monkeypatch.setattr(type(store), "info", info)
    assert index.ingest("memory://shop", delete=True).deleted == deleted


def test_what_a_list_names_and_the_store_has_lost_is_forgotten_with_its_folder(store, build, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"memory://shop/sub/{number}.png\n" for number in range(3)))
    index = build(tmp_path / "list.txt")
    store.rm("/shop/sub/1.png")
    report = index.ingest(["memory://shop", tmp_path / "list.txt"], delete=True)
    assert (report.deleted, index.info().items) == (1, 2)


def test_a_store_is_asked_anew_by_every_run(store, build, picture, tmp_path):
    from fsspec.implementations.memory import MemoryFileSystem

    class Kept(MemoryFileSystem):  # as s3fs and others do
        protocol = "kept"

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("kept://").strip("/")

        def ls(self, path, detail=True, **named):
            path = self._strip_protocol(path)
            if path not in self.dircache:
                self.dircache[path] = [dict(info) for info in super().ls(path, detail=True, **named)]
            found = self.dircache[path]
            return found if detail else [info["name"] for info in found]

        def info(self, path, **named):
            known = self._ls_from_cache(self._parent(self._strip_protocol(path))) or ()
            same = [one for one in known if one["name"] == self._strip_protocol(path)]
            return same[0] if same else super().info(path, **named)

        def invalidate_cache(self, path=None):
            self.dircache.clear()

    sys.modules["fsspec"].register_implementation("kept", Kept, clobber=True)
    (tmp_path / "list.txt").write_text("kept://shop/sub/0.png\n")
    index = build(["kept://shop", tmp_path / "list.txt"])
    store.pipe("/shop/sub/0.png", picture(60))
    store.pipe("/shop/sub/new.png", picture(61))
    store.rm("/shop/sub/1.png")
    assert index.ingest(tmp_path / "list.txt").indexed == 1
    report = index.ingest("kept://shop", delete=True)
    assert (report.indexed, report.deleted, report.unchanged) == (1, 1, 2)


def test_without_fsspec_a_url_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match=r"matvit-retrieval\[fsspec\]"):
        find_files("s3://bucket/photos")


@pytest.mark.parametrize("url", ["nosuch://bucket/photos", "memory://not-there"])
def test_a_store_that_is_not_there_is_one_sentence(url):
    pytest.importorskip("fsspec")
    with pytest.raises(IngestError) as caught:
        find_files(url)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)


def test_a_store_that_is_not_known_ends_no_ingest_of_what_is_named_beside_it(photos, build):
    index = build([photos, "foo://bucket/a.png"])
    assert len(Retriever.open(index.path)) == 10
    [skipped] = index.ingest(["foo://bucket/a.png", photos]).skipped
    assert location(skipped.path) == "foo://bucket/a.png"


def test_delete_forgets_nothing_of_a_store_that_is_there_but_was_not_meant(store, build, shard, picture):
    store.pipe("/shop/noname", picture(6))
    store.pipe("/shop/shard.tar", shard.read_bytes())
    index = build(["memory://shop", "memory://shop/noname", "memory://shop/shard.tar"])
    before = len(Retriever.open(index.path))
    for named in ("memory://shop/sub/0*.png", "memory://shop"):
        assert index.ingest(named, delete=True).deleted == 0
    assert len(Retriever.open(index.path)) == before > 4
    store.rm("/shop/sub/1.png")
    assert index.ingest("memory://shop", delete=True).deleted == 1


def test_a_store_that_names_a_host_keeps_it(store, build, elastic, picture):
    from fsspec.implementations.memory import MemoryFileSystem

    class Hosted(MemoryFileSystem):
        protocol = "hosted"

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hosted://").partition("/")[2] if path.startswith("hosted://") else path

    sys.modules["fsspec"].register_implementation("hosted", Hosted, clobber=True)
    retriever = Retriever.open(build("hosted://me@one.example/shop").path, encoder=elastic)
    [hit] = retriever.search(picture(2), k=1)
    assert location(hit.path) == "hosted://me@one.example/shop/sub/2.png"
    assert retriever.read_picture(hit.id) == picture(2)


def test_a_store_inside_another_is_refused_and_a_file_that_is_named_so_is_skipped(store, build, picture):
    with pytest.raises(
        IngestError, match=r"^zip://p::/a\.zip: names a store inside another by '::', which is not read"
    ):
        find_files("zip://p::/a.zip")
    store.pipe("/shop/sub/a::b.png", picture(5))
    index = build("memory://shop")
    assert len(Retriever.open(index.path)) == 3
    [skipped] = index.ingest("memory://shop").skipped
    assert location(skipped.path) == "memory://shop/sub/a::b.png"
    assert "names a store inside another" in skipped.reason


@pytest.mark.parametrize(
    "told",
    [
        {"size": "x", "mtime": float("nan")},
        {"size": float("nan"), "mtime": float("inf")},
        {"size": 10**30, "mtime": "0001-01-01"},
        {"size": -1, "mtime": datetime.min},
        {"size": None, "mtime": 1e300},
    ],
)
def test_what_a_store_cannot_mean_is_taken_for_untold(told):
    status = remote_status({"type": "file", **told})
    assert (status.size, status.regular) == (0, True)
    assert -(2**63) <= status.mtime_ns < 2**63


def test_a_store_may_have_a_name_that_looks_like_a_pattern(store, build, picture):
    store.pipe("/shop/sub/a[1].png", picture(5))
    assert len(Retriever.open(build("memory://shop/sub/a[1].png").path)) == 1


def test_a_file_that_grew_beyond_any_picture_is_not_read(build, photos, monkeypatch):
    retriever = Retriever.open(build(photos).path)
    os.truncate(photos / "0.png", 2**40)
    place = retriever.paths()[next(iter(retriever.paths()))].with_name("0.png")
    with pytest.raises(ImageError, match="has more than 512 MiB"):
        read_picture(place)


def test_a_store_that_is_not_reached_is_not_called_a_missing_file():
    pytest.importorskip("aiohttp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x.jpg"  # nobody listens
        for ask in (status_of, read_picture):
            with pytest.raises(OSError if ask is status_of else ImageError, match="Connect call failed") as caught:
                ask(url)
            assert not exhausted(caught.value)
            assert len(traceback.format_exception(caught.value)) < 200  # causes do not go round in circles


def test_a_file_url_is_the_file(photos, build, elastic):
    assert len(find_files(f"file://{photos}")) == 10
    assert len(find_files(Path(f"file://{photos}"))) == 10  # folds the slashes
    retriever = Retriever.open(build(photos).path, encoder=elastic)
    hits = retriever.search(f"file://{photos}/1.png", k=1, exclude_self=True)
    assert hits.query == f"{photos}/1.png"
    assert hits[0].path != photos / "1.png"


def test_what_is_named_like_a_neighbour_with_a_hash_behind_is_no_part_of_it(tmp_path, picture, elastic):
    names = ["cat.png", "cat.png#copy.png", "holiday/0.png", "holiday#2/0.png"]
    for number, name in enumerate(names):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(picture(number))
    index = Index.build(tmp_path / "p", encoder=elastic, path=tmp_path / "i")
    (tmp_path / "p" / "holiday#2").rename(tmp_path / "away")
    assert index.ingest(tmp_path / "p" / "holiday", delete=True).deleted == 0
    assert index.delete([tmp_path / "p" / "cat.png", tmp_path / "p" / "holiday"]) == 2
    left = {str(path.relative_to(tmp_path / "p")) for path in Retriever.open(index.path).paths().values()}
    assert left == {"cat.png#copy.png", "holiday#2/0.png"}


def test_a_list_may_name_what_lies_beside_a_folder_named_like_it(tmp_path, picture, build):
    (tmp_path / "list#2").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list#2" / "1.png").write_bytes(picture(1))
    (tmp_path / "list" / "list.txt").write_text("../list#2/1.png\n")
    assert len(Retriever.open(build(tmp_path / "list" / "list.txt").path)) == 1


@pytest.mark.parametrize(
    "line", ["memory://a.png", "foo://x", "foo://x/a.png", "github://a", "http://[::1/a.png", "file://"]
)
def test_a_line_that_no_store_can_give_is_skipped_and_no_other(photos, build, line):
    (photos / "list.txt").write_text(f"0.png\n{line}\n1.png\n")
    assert len(Retriever.open(build(photos / "list.txt").path)) == 2


def test_a_list_of_one_endless_line_is_refused_before_it_takes_all_memory(tmp_path, build):
    for name, head in (("list.txt", ""), ("list.csv", "path\n")):
        (tmp_path / name).write_text(head + "x" * 2**20 + "\n")
        with pytest.raises(IngestError, match=r"line [12] is longer than 1,048,576 characters"):
            build(tmp_path / name)


@pytest.mark.parametrize("name", ["file://", "file:/", "file:///", "local://"])
def test_a_file_url_that_names_no_file_is_not_the_whole_machine(name):
    with pytest.raises(IngestError, match="names no file"):
        find_files(name)


@pytest.mark.parametrize("ask", [open_picture, status_of, open_regular])
def test_a_name_that_no_file_can_have_is_said_to_be_none(ask):
    with pytest.raises(OSError, match="no file can have this name"):
        ask("/a\0b.png")


@pytest.mark.parametrize("head", ["file://", "FILE://", "file://localhost", "file:", "file:/", "local://"])
def test_a_file_url_may_be_written_in_several_ways(head):
    assert location(f"{head}/a%20b/1.png") == "/a b/1.png"


def test_a_file_url_may_spell_letters_by_their_bytes_as_percent_signs(tmp_path, picture, build, elastic):
    folder = tmp_path / "a b"
    folder.mkdir()
    names = ["100%.png", "a%20b.png", "ü#1.png", os.fsdecode(b"\xff.png")]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    assert len(find_files(folder.as_uri())) == 4
    assert location((folder / "100%.png").as_uri().replace("%25", "%")) == str(folder / "100%.png")  # spells none
    (tmp_path / "list.txt").write_text("".join(f"{(folder / name).as_uri()}\n" for name in names))
    retriever = Retriever.open(build(tmp_path / "list.txt").path, encoder=elastic)
    assert {path.name for path in retriever.paths().values()} == set(names)
    for name in names:
        [hit] = retriever.search((folder / name).as_uri(), k=1)
        assert hit.path == folder / name


@pytest.fixture
def places(shard, store, tmp_path, picture):
    """Locations of picture(1) that are no files."""
    table = write_table(tmp_path / "rows.parquet", {"image": [picture(0), picture(1), picture(2)]})
    return [f"{shard}#a/1.png", f"{table}#1", "memory://shop/sub/1.png"]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_place_in_a_shard_a_table_or_a_store_can_be_searched_with(places, kind, build, elastic, picture, monkeypatch):
    index = build([place.split("#")[0] for place in places])
    retriever = Retriever.open(index.path, encoder=elastic)
    expected = [(hit.id, hit.score) for hit in retriever.search(picture(1))]
    for place in places:
        hits = retriever.search(kind(place))
        assert hits.query == place
        assert [(hit.id, hit.score) for hit in hits] == expected
        assert location(hits[0].path) in places
        others = retriever.search(kind(place), exclude_self=True)
        assert {hit.id for hit in hits} - {hit.id for hit in others} == {hit.id for hit in hits[:3]}
    monkeypatch.chdir(index.path.parent)
    assert len(retriever.search(kind("shard.tar#a/1.png"), exclude_self=True)) == len(expected) - 3


def test_a_place_that_holds_no_picture_is_named_in_one_sentence(places, build, elastic, tmp_path):
    retriever = Retriever.open(build(places[0].split("#")[0]).path, encoder=elastic)
    bad = [place[:-1] + "9" for place in places]  # another suffix, row or file
    bad += [f"{tmp_path / 'shard.tar'}#a/2.bin", f"{tmp_path / 'gone.tar'}#a/1.png"]
    for place in bad:
        with pytest.raises(ImageError) as caught:
            retriever.search(place)
        assert str(caught.value).startswith(f"{place}: ")
        assert "\n" not in str(caught.value)


def test_a_disk_without_room_for_the_list_of_files_is_one_sentence(photos, monkeypatch):
    def refuse(*arguments, **named):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(IngestError, match=r"the list of files cannot be kept \(database or disk is full\); make room"):
        find_files(photos)


def test_an_index_that_kept_file_urls_knows_its_pictures_again(photos, build, elastic, tmp_path):
    (photos / "list.txt").write_text("".join(f"{photos}/{number}.png\n" for number in range(3)))
    index = build(photos / "list.txt")
    pointer = read_pointer(index.path)
    manifest = json.loads((index.path / "generations" / pointer.name).read_text())
    manifest["roots"] = {name: f"file://{folder}" for name, folder in manifest["roots"].items()}
    data = json.dumps(manifest).encode()
    for name in (pointer.name, pointer.name.replace(".json", ".copy.json")):
        (index.path / "generations" / name).write_bytes(data)
    (index.path / "CURRENT").write_text(f"{pointer.name} {hashlib.sha256(data).hexdigest()}\n")
    report = Index.open(index.path).ingest(photos / "list.txt", encoder=elastic, delete=True)
    assert (report.indexed, report.unchanged, report.deleted) == (0, 3, 0)


def test_a_table_whose_rows_find_no_memory_is_not_called_damaged(tmp_path, picture, build, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    write_table(tmp_path / "rows.parquet", {"image": [picture(0)]})

    def refuse(_):
        raise pa.lib.ArrowMemoryError

    monkeypatch.setattr("retrieval.shards._plain", refuse)
    with pytest.raises(IngestError, match="its rows take more memory than there is"):
        build(tmp_path / "rows.parquet")
