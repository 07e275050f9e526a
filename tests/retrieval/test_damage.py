"""Kills, full disks, flipped bits and second writers: an index is whole or says why not, never silently wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

import retrieval.index
import retrieval.ingest
import retrieval.lock
from retrieval import (
    Index,
    IndexExistsError,
    IndexFormatError,
    IndexLockedError,
    IndexWarning,
    IngestError,
    Retriever,
)
from retrieval.backends import choice
from retrieval.errors import DamagedFileError
from retrieval.files import remove, sha256_bytes
from retrieval.lock import writer_lock
from retrieval.manifest import UPGRADES, publish_manifest, read_manifest, read_pointer
from retrieval.writer import Entry, GenerationWriter

QUERIES = [runpy.run_path(str(Path(__file__).with_name("conftest.py")))["picture_bytes"](seed) for seed in (1, 2)]
FLIPS = int(os.environ.get("MATVIT_SOAK_FLIPS", "20"))  # in each kind of file


@pytest.fixture
def index(tmp_path, photos, elastic):
    """Two segments and a deletion."""
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    (photos / "3.png").unlink()
    (photos / "bad.png").write_text("no picture")
    index.ingest(photos, delete=True)
    return index


def files_of(folder):
    manifest = read_manifest(folder, read_pointer(folder))
    yield folder / "CURRENT"
    yield folder / "generations" / f"{manifest.generation:06d}.json"
    for segment in manifest.segments:
        yield from (folder / "segments" / segment.name / name for name in segment.files)
    yield from (folder / "deletions" / entry.file for entry in manifest.deletions.values())


def leave_an_upgrade(index, photos, elastic):
    """What is embedded for another encoder waits in the index, since a picture was away."""
    (photos / "4.png").rename(photos.with_name("away"))
    assert not index.upgrade(elastic.in_another_space()).published
    photos.with_name("away").rename(photos / "4.png")


def test_every_file_of_an_index_is_one_whose_bits_are_flipped(index, photos, elastic, monkeypatch):
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)
    index.set_search("sq")
    leave_an_upgrade(index, photos, elastic)
    flipped = [*files_of(index.path), *files_of(index.path / "upgrade"), *index.path.glob("cache/*.faiss")]
    there = {path for path in index.path.rglob("*") if path.is_file()}
    staged = index.path / "upgrade" / "generations"
    copies = {index.path / "generations" / "000004.copy.json", staged / "000002.copy.json"}
    before = {staged / "000001.json", staged / "000001.copy.json"}
    assert there - set(flipped) == {index.path / "writer.lock", *copies, *before}


def flips(path):
    """The file with one bit flipped, each time another one; whole again afterwards."""
    random = np.random.default_rng(int(os.environ.get("MATVIT_SOAK_SHARD", "0")))
    whole = path.read_bytes()
    for position in random.integers(0, 8 * len(whole), size=FLIPS) if whole else ():  # a segment without pictures
        spoilt = bytearray(whole)
        spoilt[position // 8] ^= 1 << (position % 8)
        path.write_bytes(spoilt)
        yield
    path.write_bytes(whole)


def test_a_single_flipped_bit_in_any_file_is_found_before_it_can_be_searched(index, elastic):
    """Embeddings, which take long to hash, when they are read; everything else, and a wrong size, by any opening."""
    for path in files_of(index.path):
        for _ in flips(path):
            with pytest.raises(IndexFormatError):
                Retriever.open(index.path, encoder=elastic)
            if path.suffix != ".f32":
                with pytest.raises(IndexFormatError):
                    Index.open(index.path)
            assert len(index.verify()) == 1, path
    assert Index.open(index.path).verify() == []


def test_a_single_flipped_bit_in_the_copy_of_a_manifest_is_told_and_harms_no_reader(index, elastic):
    right = answers(index.path, elastic)
    copy = index.path / "generations" / "000003.copy.json"
    for _ in flips(copy):
        assert answers(index.path, elastic) == right
        assert index.verify() == [
            f"{copy}: the file is not the copy of what was published; try matvit repair, which never makes it worse, "
            "or restore the index from a copy"
        ]
    assert Index.open(index.path).verify() == []


def answers(path, encoder):
    """What a search for two of its pictures finds, all there is."""
    retriever = Retriever.open(path, encoder=encoder)
    found = retriever.search_many(QUERIES, k=99)
    return [[(hit.id, hit.path, round(hit.score, 6)) for hit in hits] for hits in found]


def test_a_single_flipped_bit_in_an_approximate_index_is_told_and_every_vector_compared(index, elastic, monkeypatch):
    right = answers(index.path, elastic)
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)
    index.set_search("sq")
    [path] = index.path.glob("cache/*.faiss")
    for _ in flips(path):
        with pytest.warns(IndexWarning, match="every vector is compared"):
            assert answers(index.path, elastic) == right
        assert len(index.verify()) == 1
    assert Index.open(index.path).verify() == []


def test_a_single_flipped_bit_in_a_staged_upgrade_is_told_or_its_pictures_are_embedded_again(index, photos, elastic):
    other = elastic.in_another_space()
    leave_an_upgrade(index, photos, elastic)
    right, victim = answers(index.path, elastic), index.path.with_name("victim.index")
    for path in files_of(index.path / "upgrade"):
        for _ in flips(path):
            shutil.copytree(index.path, victim)
            assert Index.open(victim).verify() == []
            try:
                Index.open(victim).upgrade(other)
            except DamagedFileError as error:
                assert str(victim / "upgrade") in error.where  # noqa: PT017 - or it is adopted
                assert answers(victim, elastic) == right
            else:
                assert answers(victim, other) == right
            shutil.rmtree(victim)


def test_a_single_flipped_bit_in_the_lock_is_harmless(index, photos, elastic):
    for _ in flips(index.path / "writer.lock"):
        assert Index.open(index.path).ingest(photos, encoder=elastic).unchanged == 9


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x")])
def test_items_that_are_lost_while_an_index_is_open_are_named_and_not_made_anew(index, photos, harm):
    store = index.path / "segments" / read_manifest(index.path, read_pointer(index.path)).segments[0].name
    harm(store / "items.sqlite")
    before = {path: path.read_bytes() for path in store.iterdir()}
    for work in (lambda: index.ingest(photos), lambda: index.delete([photos / "4.png"])):
        with pytest.raises(DamagedFileError) as told:
            work()
        assert told.value.where == str(store / "items.sqlite")
    assert {path: path.read_bytes() for path in store.iterdir()} == before


def test_damaged_embeddings_are_never_copied_into_a_new_segment(index, photos, elastic):
    for path in (index.path / "segments").glob("*/embeddings.f32"):
        data = bytearray(path.read_bytes())
        if data:
            data[5] ^= 4
            path.write_bytes(data)
    for picture in photos.rglob("*.png"):
        os.utime(picture, ns=(1, 1))
    for copies in (Index.compact, lambda index: index.ingest(photos, encoder=elastic)):
        opened = Index.open(index.path)
        with pytest.raises(IndexFormatError, match=r"embeddings\.f32: .*sha256 differs"):
            copies(opened)
        assert Index.open(index.path).generation == index.generation


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 1)])
def test_a_lost_or_cut_file_is_named_in_one_sentence(index, harm):
    for path in files_of(index.path):
        whole = path.read_bytes()
        if not whole:
            continue
        harm(path)
        with pytest.raises(IndexFormatError) as caught:
            Index.open(index.path)
        assert path.name in str(caught.value) or "holds no index" in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)


def test_an_id_of_two_items_is_told(index):
    segment = index._snapshot.segments[0]
    twice = next(item for item in segment.live(segment.items.all()) if item.row is not None)
    again = Entry(item=twice, embedding=segment.embeddings()[twice.row], replaces=None)
    with index._writing() as writer:
        manifest = writer.manifest
        writer.publish([again], deleted={}, roots=manifest.roots, next_id=manifest.next_id)
    assert index.verify() == [f"id {twice.id} belongs to several items"]


def rewrite_manifest(index, change):
    """Publish a changed manifest the way a program of another version would: with the right hash, without a copy."""
    path = index.path / "generations" / read_pointer(index.path).name
    data = change(path.read_bytes())
    path.write_bytes(data)
    (index.path / "CURRENT").write_bytes(f"{path.name} {sha256_bytes(data)}\n".encode())
    path.with_suffix(".copy.json").unlink()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b'"format_version": 3', b'"format_version": 4', "format version 4, newer than the 3 that this program reads"),
        (b'"format_version": 3', b'"format_version": "x"', "format version x, which is unknown"),
        (b'"index_type": "exact"', b'"index_type": "magic"', "bad field 'index_type'"),
        (b'"next_id":', b'"extra": 1, "next_id":', "bad field 'extra'"),
        (b'"name": "', b'"name": "../', "bad field 'segments.0.name'"),
        (b'"format_version": 3', b'"format_version": [1]', r"format version \[1\], which is unknown"),
        (b'"format_version": 3', b'"format_version": {}', "format version {}, which is unknown"),
        (b'"format_version": 3', b'"format_version": true', "format version True, which is unknown"),
        (b'"items.sqlite"', b'"embeddings.f32"', "bad field 'segments.0.files'"),
        (b'"generation": 3', b'"generation": 99', "000003.json: the file holds generation 99"),
        (b'"next_id": ', b'"next_id": 9223372036854775807', "bad field 'next_id'"),
        (b'"photos": "', b'"photos": "..', "bad field 'roots.photos'.*no absolute folder"),
        (b'"photos": "', b'"photos": "/\\u0000', "bad field 'roots.photos'.*no absolute folder"),
        (b'"photos": "', b'"other": "', "items.sqlite: items lie outside the index's roots"),
        (b"{", b"[", "is no JSON"),
        (b"{", b"[" * 200_000, "is no JSON"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_by_name(index, old, new, sentence):
    if sentence.endswith("name'"):  # the first "name" is the encoder's, free text
        rewrite_manifest(index, lambda data: data.replace(b'"name": "fake"', b'"name" : "fake"').replace(old, new, 1))
    else:
        rewrite_manifest(index, lambda data: data.replace(old, new, 1))
    with pytest.raises(IndexFormatError, match=sentence):
        Index.open(index.path)


@pytest.mark.parametrize("part", ["segments", "deletions"])
def test_a_manifest_names_each_segment_once_and_no_others_deletions(index, part):
    def change(data):
        raw = json.loads(data)
        if part == "segments":
            raw["segments"].append(raw["segments"][0])
        else:
            raw["deletions"] = {"0" * 16: next(iter(raw["deletions"].values()))}
        return json.dumps(raw).encode()

    rewrite_manifest(index, change)
    with pytest.raises(IndexFormatError, match="names a segment twice, or deletions of none"):
        Retriever.open(index.path)
    assert len(index.verify()) == 1


@pytest.mark.parametrize("path", [b"../../etc/passwd", b"..", b"a/../../b", b"a/..", b"/etc/passwd", b"a\0b"])
def test_an_item_that_leads_out_of_its_root_is_refused(index, path):
    name = json.loads(Path(index.path, "generations", "000003.json").read_bytes())["segments"][0]["name"]
    items = index.path / "segments" / name / "items.sqlite"
    before = items.read_bytes()
    with closing(sqlite3.connect(items)) as connection, connection:
        connection.execute("UPDATE items SET path = ? WHERE id = 1", (path,))
    after = items.read_bytes()
    entries = [f'"bytes": {len(data)},\n     "sha256": "{sha256_bytes(data)}"'.encode() for data in (before, after)]
    rewrite_manifest(index, lambda data: data.replace(*entries))
    for open_it in (Index.open, Retriever.open):
        with pytest.raises(IndexFormatError, match="items lie outside the index's roots"):
            open_it(index.path)
    assert len(index.verify()) == 1


def test_dots_in_a_name_lead_nowhere(tmp_path, elastic, picture):
    for name in ("..a.png", "b..png", "c.."):
        (tmp_path / name).write_bytes(picture(1))
    index = Index.build(
        [tmp_path / "..a.png", tmp_path / "b..png", tmp_path / "c.."], encoder=elastic, path=tmp_path / "i"
    )
    assert Index.open(index.path).info().items == 3


def test_an_older_manifest_is_upgraded_step_by_step(index, monkeypatch):
    monkeypatch.setitem(UPGRADES, 0, lambda raw: {**raw, "format_version": 1, "index_type": "exact"})
    rewrite_manifest(
        index,
        lambda data: data.replace(b'"format_version": 3', b'"format_version": 0').replace(
            b' "index_type": "exact",\n', b""
        ),
    )
    assert Index.open(index.path).info().items == 9


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_at_any_step_leaves_a_whole_index(index, photos, elastic, picture, failing, name):
    (photos / "new.png").write_bytes(picture(80))
    (photos / "5.png").unlink()
    for at in range(100):
        folder = index.path.with_name(f"{name}-{at}")
        shutil.copytree(index.path, folder)
        try:
            with failing(name, at=at):
                Index.open(folder).ingest(photos, encoder=elastic, delete=True)
        except IngestError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - the last attempt must succeed
            after = Index.open(folder)
            # Only the very last step, syncing the folder after CURRENT was renamed, fails with the new state in place.
            assert after.generation in {index.generation, index.generation + 1}
            assert after.verify() == []
            after.ingest(photos, encoder=elastic, delete=True)
            assert (after.info().items, after.verify()) == (9, [])
            assert not list(folder.rglob(".tmp-*"))
        else:
            break
    assert at >= 4  # every step was reached, and the last attempt met no failure


def interrupts(monkeypatch, *, at):
    """Ctrl-C at each of these calls of `os.fsync`; says afterwards how many there were."""
    calls = []
    real = os.fsync

    def call(descriptor):
        calls.append(descriptor)
        if len(calls) - 1 in at:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", call)
    return calls


def test_two_interrupts_at_any_steps_leave_a_whole_index(index, photos, elastic, picture, monkeypatch):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 1)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 1)  # so that it publishes in mid-run, too
    (photos / "new.png").write_bytes(picture(80))
    (photos / "5.png").unlink()
    with monkeypatch.context() as patch:
        shutil.copytree(index.path, index.path.with_name("counted"))
        calls = interrupts(patch, at=())
        Index.open(index.path.with_name("counted")).ingest(photos, encoder=elastic, delete=True)
        steps = len(calls)
    assert steps >= 8
    for first in range(steps):
        for second in range(first + 1, first + 1 + steps):
            folder = Path(shutil.copytree(index.path, index.path.with_name(f"{first}-{second}")))
            with monkeypatch.context() as patch:
                interrupts(patch, at=(first, second))
                with pytest.raises(KeyboardInterrupt):
                    Index.open(folder).ingest(photos, encoder=elastic, delete=True)
            after = Index.open(folder)
            assert after.verify() == []
            after.ingest(photos, encoder=elastic, delete=True)
            assert (after.info().items, after.verify()) == (9, [])
            shutil.rmtree(folder)


def test_a_manifest_is_never_overwritten(index):
    manifest = read_manifest(index.path, read_pointer(index.path))
    with pytest.raises(FileExistsError):
        publish_manifest(index.path, manifest)


@pytest.mark.parametrize("limit", [100, 1000, 8000])
def test_a_file_that_cannot_grow_leaves_the_generation_before(index, photos, elastic, picture, limit):
    for seed in range(30):
        (photos / f"more-{seed}.png").write_bytes(picture(100 + seed))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(IngestError, match="cannot be written"):
            index.ingest(photos, encoder=elastic)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before = Index.open(index.path)
    assert (before.generation, before.info().items, before.verify()) == (index.generation, 9, [])
    assert before.ingest(photos, encoder=elastic).indexed == 30


def test_an_approximate_index_that_cannot_grow_leaves_the_generation_before(index, elastic, monkeypatch):
    """The disk is full at any byte: those that are written when a file is closed, too."""
    right = answers(index.path, elastic)
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused = []
    for limit in range(1, 20_000, 400):
        folder = Path(shutil.copytree(index.path, index.path.with_name(f"{limit}.index")))
        opened = Index.open(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            opened.set_search("hnsw")
        except IngestError as error:
            assert "cannot be written" in str(error)  # noqa: PT017 - with room enough it is built
            refused.append(limit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        after = Index.open(folder)
        assert (after.info().index_type, after.verify()) == ("exact" if limit in refused else "hnsw", [])
        assert answers(folder, elastic) == right
        assert opened.set_search("hnsw").index_type == "hnsw"
    assert 4 <= len(refused) == refused.index(max(refused)) + 1 < 50


SLOW_INGEST = """
import runpy, sys, time
import retrieval.index
import retrieval.ingest
from retrieval import Index

retrieval.pipeline.BATCH, retrieval.ingest.PUBLISH_ITEMS = 4, 8
helpers = runpy.run_path(sys.argv[1])
encode = helpers["FakeEncoder"].encode
helpers["FakeEncoder"].encode = lambda self, pixels: (time.sleep(0.01), encode(self, pixels))[1]
Index.open(sys.argv[2]).ingest(sys.argv[3], encoder=helpers["FakeElastic"]())
"""


def start_slow_ingest(index, photos):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_INGEST, str(Path(__file__).with_name("conftest.py")), str(index.path), str(photos)]
    )


def wait_for_generation(index, generation):
    deadline = time.monotonic() + 60
    while int(read_pointer(index.path).name.removesuffix(".json")) < generation:
        assert time.monotonic() < deadline, "the writer does not publish"
        time.sleep(0.005)


@pytest.mark.parametrize("extra_ms", [0, 7, 16])
def test_a_kill_in_mid_ingest_loses_little_and_a_rerun_continues(tmp_path, photos, elastic, picture, extra_ms):
    for seed in range(190):
        (photos / f"more-{seed}.png").write_bytes(picture(1000 + seed))
    index = Index.create(tmp_path / "i", encoder=elastic)
    writer = start_slow_ingest(index, photos)
    try:
        wait_for_generation(index, 4)
        time.sleep(extra_ms / 1000)
    finally:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    # What a kill at worse moments would leave as well:
    (index.path / "segments" / ".tmp-1-segment").mkdir()
    (index.path / "segments" / ("0" * 16)).mkdir()
    (index.path / ".tmp-1-CURRENT").touch()
    (index.path / "generations" / "000999.json").touch()

    survived = Index.open(index.path)
    items = survived.info().items
    assert 24 <= items < 200
    assert survived.verify() == []
    report = survived.ingest(photos, encoder=elastic)
    assert (report.indexed, report.unchanged) == (200 - items, items)
    assert (survived.info().items, survived.verify()) == (200, [])
    assert not list(index.path.rglob(".tmp-*"))
    assert not (index.path / "segments" / ("0" * 16)).exists()
    assert not (index.path / "generations" / "000999.json").exists()


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path, photos, elastic, picture):
    for seed in range(300):
        (photos / f"more-{seed}.png").write_bytes(picture(1000 + seed))
    index = Index.create(tmp_path / "i", encoder=elastic)
    writer = start_slow_ingest(index, photos)
    try:
        wait_for_generation(index, 2)
        with pytest.raises(IndexLockedError, match=f"process {writer.pid} is writing"):
            index.ingest(photos)
        reader = Retriever.open(index.path, encoder=elastic)  # readers are welcome meanwhile
        pinned = len(reader)
        wait_for_generation(index, reader.generation + 1)
        assert len(reader.search(picture(1000), k=1000)) == pinned
        reader.reload()
        assert len(reader) > pinned
    finally:
        writer.kill()
        writer.wait()
    assert index.ingest(photos, encoder=elastic).unchanged > 0  # the lock went with its holder


def test_the_lock_is_free_again_after_its_holder(tmp_path):
    for _ in range(2):
        with (
            writer_lock(tmp_path),
            pytest.raises(IndexLockedError, match=f"process {os.getpid()}"),
            writer_lock(tmp_path),
        ):
            pass


def test_an_index_is_not_created_over_anything(tmp_path, index, elastic, photos):
    (tmp_path / "file").touch()
    for path, what in ((index.path, "already holds an index"), (photos, "other files"), (tmp_path / "file", "a file")):
        with pytest.raises(IndexExistsError, match=what):
            Index.create(path, encoder=elastic)


def test_an_index_without_its_current_is_damaged_and_never_written_over(tmp_path, index, elastic, photos):
    (index.path / "CURRENT").unlink()
    before = sorted(index.path.rglob("*"))
    for attempt in (
        lambda: Index.create(index.path, encoder=elastic),
        lambda: Index.build(photos, encoder=elastic, path=index.path),
        lambda: Index.open(index.path),
        lambda: Retriever.open(index.path),
    ):
        with pytest.raises(IndexFormatError, match=r"CURRENT: a file of the index is missing"):
            attempt()
    assert len(index.verify()) == 1
    assert sorted(index.path.rglob("*")) == before


def test_the_folders_of_an_index_with_other_files_in_them_are_not_taken_for_a_killed_creation(tmp_path, elastic):
    for part in ("generations", "segments", "deletions"):
        (tmp_path / part / "generations").mkdir(parents=True)
        (tmp_path / part / part).mkdir(exist_ok=True)
        (tmp_path / part / part / "mine.txt").touch()
        with pytest.raises(IndexExistsError, match="holds other files"):
            Index.create(tmp_path / part, encoder=elastic)


def test_an_index_that_already_exists_names_the_call_that_updates_it(index, photos, elastic):
    with pytest.raises(IndexExistsError) as caught:
        Index.build(photos, encoder=elastic, path=index.path)
    assert f"Index.open('{index.path}').ingest(images)" in str(caught.value)


def test_nothing_is_created_when_there_are_no_pictures(tmp_path, elastic):
    with pytest.raises(IngestError, match="no such file or folder"):
        Index.build(tmp_path / "none", encoder=elastic, path=tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("made_before", [False, True])
def test_nothing_stays_when_no_file_is_a_picture(tmp_path, elastic, made_before):
    (tmp_path / "bad.jpg").write_text("no picture")
    if made_before:
        (tmp_path / "i").mkdir()
    with pytest.raises(IngestError, match=r"bad\.jpg: not a picture"):
        Index.build(tmp_path / "bad.jpg", encoder=elastic, path=tmp_path / "i")
    assert (tmp_path / "i").exists() == made_before
    assert not list(tmp_path.glob("i/*"))


def test_a_failed_build_leaves_what_others_put_into_its_folder_meanwhile(tmp_path, elastic, monkeypatch):
    def put_beside(index, *arguments, **named):
        (index.path / "mine").mkdir()
        (index.path / "mine" / "notes.txt").touch()
        raise IngestError(what="the disk is full", where="here", fix="make room")

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Index, "_ingest", put_beside)
    with pytest.raises(IngestError, match="the disk is full"):
        Index.build(tmp_path / "a.png", encoder=elastic, path=tmp_path / "i")
    assert sorted((tmp_path / "i").rglob("*")) == [tmp_path / "i" / "mine", tmp_path / "i" / "mine" / "notes.txt"]


@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_build_that_meets_a_full_disk_keeps_what_was_published(
    tmp_path, photos, elastic, monkeypatch, failing, published
):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    publish = GenerationWriter.publish

    def fill_the_disk(writer, *arguments, **named):
        if writer.manifest.generation > published:
            with failing("fsync", at=0):
                publish(writer, *arguments, **named)
        publish(writer, *arguments, **named)

    monkeypatch.setattr(GenerationWriter, "publish", fill_the_disk)
    with pytest.raises(IngestError, match="No space left on device"):
        Index.build(photos, encoder=elastic, path=tmp_path / "i")
    assert (tmp_path / "i").exists() == (published > 0)
    if published:
        assert Index.open(tmp_path / "i").info().items == 4 * published


def test_what_a_refused_creation_has_made_is_removed_before_another_may_begin_there(
    tmp_path, elastic, monkeypatch, failing
):
    discard, met = retrieval.index._discard_unmade, []

    def discard_beside_another(folder, **named):
        with pytest.raises(IndexLockedError):
            Index.create(folder, encoder=elastic)
        discard(folder, **named)
        met.append(folder)

    monkeypatch.setattr(retrieval.index, "_discard_unmade", discard_beside_another)
    with failing("replace", at=0), pytest.raises(IngestError, match="No space left on device"):
        Index.create(tmp_path / "i", encoder=elastic)
    assert met == [tmp_path / "i"]
    assert not (tmp_path / "i").exists()
    assert Index.create(tmp_path / "i", encoder=elastic).verify() == []


def test_an_object_shows_what_a_failed_run_has_published(tmp_path, photos, elastic, monkeypatch, failing):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    index = Index.create(tmp_path / "i", encoder=elastic)
    with failing("fsync", at=14), pytest.raises(IngestError):
        index.ingest(photos)
    assert index.generation == Index.open(index.path).generation > 1


def test_an_empty_index_that_another_process_writes_to_is_left_alone(tmp_path, photos, elastic, monkeypatch):
    def locked(index, *arguments, **named):
        holder.enter_context(writer_lock(index.path))
        raise IngestError(what="the disk is full", where="here", fix="make room")

    monkeypatch.setattr(Index, "_ingest", locked)
    with ExitStack() as holder, pytest.raises(IngestError):
        Index.build(photos, encoder=elastic, path=tmp_path / "i")
    assert Index.open(tmp_path / "i").info().items == 0


def test_an_index_that_another_process_is_just_discarding_is_not_told_as_damaged(tmp_path, elastic, monkeypatch):
    told = []

    def create_meanwhile(path):
        with pytest.raises((IndexLockedError, IndexExistsError)) as caught:
            Index.create(path.parent, encoder=elastic)
        told.append(caught.type)
        remove(path)

    (tmp_path / "bad.png").write_text("no picture")
    monkeypatch.setattr(retrieval.index, "remove", create_meanwhile)
    with pytest.raises(IngestError, match="not a picture"):
        Index.build(tmp_path / "bad.png", encoder=elastic, path=tmp_path / "i")
    assert told[0] is IndexLockedError
    assert not (tmp_path / "i" / "writer.lock").exists()


def test_an_index_is_created_where_another_process_has_just_discarded_its_own(tmp_path, elastic, monkeypatch):
    @contextmanager
    def lock_after_removal(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        with writer_lock(folder):
            yield

    monkeypatch.setattr(retrieval.index, "writer_lock", lock_after_removal)
    assert Index.create(tmp_path / "i", encoder=elastic).verify() == []


def test_a_folder_that_was_removed_meanwhile_cannot_be_locked(tmp_path):
    with pytest.raises(IndexLockedError, match="has just removed"), writer_lock(tmp_path / "gone"):
        pass


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    def remove_then_lock(descriptor):
        (tmp_path / "writer.lock").unlink()

    monkeypatch.setattr(retrieval.lock, "lock", remove_then_lock)
    with pytest.raises(IndexLockedError, match="has just removed"), writer_lock(tmp_path):
        pass


def test_a_holder_that_takes_its_lock_with_it_is_told_as_unknown(tmp_path, monkeypatch):
    def refuse(descriptor):
        (tmp_path / "writer.lock").unlink()
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    monkeypatch.setattr(retrieval.lock, "lock", refuse)
    with pytest.raises(IndexLockedError, match="process unknown is writing"), writer_lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_told_as_such(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / "writer.lock").write_text(f"{os.getpid()}\n")
    monkeypatch.setattr(retrieval.lock, "lock", refuse)
    with (
        pytest.raises(IngestError, match=r"cannot be locked for writing \(No locks available\)"),
        writer_lock(tmp_path),
    ):
        pass


def test_a_creation_that_was_killed_can_be_repeated(tmp_path, elastic):
    (tmp_path / "i" / "generations").mkdir(parents=True)
    (tmp_path / "i" / "generations" / ".tmp-1-000001.json").touch()
    (tmp_path / "i" / "generations" / "000001.json").touch()
    (tmp_path / "i" / "writer.lock").touch()
    assert Index.create(tmp_path / "i", encoder=elastic).info().items == 0


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("name", ["mkdir", "write", "fsync", "replace"])
def test_a_disk_that_fails_while_an_index_is_made_keeps_nothing_of_it(tmp_path, elastic, failing, name, made_before):
    path = tmp_path / "i"
    if made_before:
        path.mkdir()
    for at in range(100):
        try:
            with failing(name, at=at):
                Index.create(path, encoder=elastic)
        except IngestError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - the last attempt must succeed
            assert path.exists() == made_before
            assert not list(tmp_path.glob("i/*"))
        else:
            break
    assert at >= 1
    assert Index.open(path).verify() == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, elastic):
    (tmp_path / "file").touch()
    with pytest.raises(IngestError, match=r"cannot be written.*again: nothing that was published is lost"):
        Index.create(tmp_path / "file" / "i", encoder=elastic)
