"""Repair brings back what can be proven, names the rest, and changes nothing while something would be lost."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import retrieval.backends.cache
import retrieval.reembed
from matvit.errors import MatVitError
from retrieval import Index, IndexFormatError, IngestError, Retriever
from retrieval.errors import DamagedFileError, IndexLockedError
from retrieval.lock import writer_lock
from retrieval.manifest import read_manifest, read_pointer
from retrieval.writer import GenerationWriter


@pytest.fixture
def index(tmp_path, photos, elastic):
    """Two segments, a deletion, a skipped file."""
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    (photos / "3.png").unlink()
    (photos / "bad.png").write_text("no picture")
    (photos / "new.png").write_bytes((photos / "1.png").read_bytes()[:-12] + b"\0" * 30)
    index.ingest(photos, delete=True)
    return index


def flip(path, position, bit=3):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


def contents(index, elastic, picture):
    hits = Retriever.open(index.path, encoder=elastic).search(picture(1), k=99).hits
    return hits, [file.path.name for file in Index.open(index.path).info().skipped]


def files_of(index):
    return sorted(path.relative_to(index.path) for path in index.path.rglob("*") if path.name != "writer.lock")


def manifest_of(index):
    return index.path / "generations" / read_pointer(index.path).name


def copy_of_manifest(index):
    return manifest_of(index).with_suffix(".copy.json")


def first_segment(index):
    return index.path / "segments" / read_manifest(index.path, read_pointer(index.path)).segments[0].name


@pytest.mark.parametrize(
    "harm",
    [
        lambda index: (index.path / "CURRENT").unlink(),
        lambda index: (index.path / "CURRENT").write_bytes(b""),
        lambda index: flip(index.path / "CURRENT", 3),
        lambda index: flip(index.path / "CURRENT", 40),
        lambda index: flip(manifest_of(index), 60),
        lambda index: [flip(manifest_of(index), 700 + number) for number in range(9)],
        lambda index: manifest_of(index).unlink(),
        lambda index: os.truncate(manifest_of(index), 0),
        lambda index: flip(copy_of_manifest(index), 60),
        lambda index: os.truncate(copy_of_manifest(index), 0),
        lambda index: [manifest_of(index).unlink(), (index.path / "CURRENT").unlink()],
        lambda index: flip(first_segment(index) / "embeddings.f32", 77),
        lambda index: (first_segment(index) / "embeddings.f32").unlink(),
        lambda index: os.truncate(first_segment(index) / "embeddings.f32", 64),
    ],
)
def test_nothing_is_lost_while_the_pictures_are_there(index, elastic, picture, harm):
    expected = contents(index, elastic, picture)
    harm(index)
    assert len(index.verify()) >= 1
    report = Index.repair(index.path, encoder=elastic)
    assert report.whole
    assert len(report.damage) >= 1
    assert (report.lost, report.lost_unnamed) == ((), 0)
    assert contents(index, elastic, picture) == expected
    assert Index.open(index.path).verify(sample=0) == []
    assert Index.repair(index.path).damage == ()


def test_each_damaged_segment_is_written_anew_as_it_was_or_in_parts_where_it_is_large(
    index, elastic, picture, monkeypatch
):
    expected = contents(index, elastic, picture)
    before = read_manifest(index.path, read_pointer(index.path)).segments
    for path in index.path.glob("segments/*/embeddings.f32"):
        if path.stat().st_size:
            flip(path, 5)
    monkeypatch.setattr(retrieval.repair, "MERGED_ITEMS", 6)
    report = Index.repair(index.path, encoder=elastic)
    after = read_manifest(index.path, read_pointer(index.path)).segments
    assert (report.whole, report.embedded) == (True, 10)
    assert [entry.items for entry in before] == [10, 2]
    assert sorted(entry.items for entry in after) == [2, 3, 6]
    assert contents(index, elastic, picture) == expected


def test_a_repair_that_is_interrupted_while_it_embeds_leaves_nothing(index, elastic, monkeypatch):
    for path in index.path.glob("segments/*/embeddings.f32"):
        flip(path, 5)
    before, calls = files_of(index), []

    def interrupt(writer, entries):
        if calls:
            raise KeyboardInterrupt
        calls.append(entries)
        return write(writer, entries)

    write = GenerationWriter.write_segment
    monkeypatch.setattr(GenerationWriter, "write_segment", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Index.repair(index.path, encoder=elastic)
    assert calls
    assert files_of(index) == before


def test_a_whole_index_is_left_as_it_is_but_for_leftovers(index):
    (index.path / "segments" / ".tmp-1-segment").mkdir()
    (index.path / "segments" / ("0" * 16)).mkdir()
    assert set(Index.repair(index.path).removed) > {"segments/.tmp-1-segment", f"segments/{'0' * 16}"}
    before = files_of(index), index.generation
    report = Index.repair(index.path)
    assert (report.damage, report.removed, report.whole) == ((), (), True)
    assert (files_of(index), Index.open(index.path).generation) == before
    assert not list(index.path.rglob(".tmp-*"))


def test_what_cannot_be_brought_back_is_named_and_stays_until_it_is_given_up(index, photos, elastic, picture):
    flip(first_segment(index) / "embeddings.f32", 5)
    (photos / "2.png").unlink()
    before = files_of(index)
    report = Index.repair(index.path, encoder=elastic)
    assert not report.whole
    assert [file.path.name for file in report.lost] == ["2.png"]
    assert "its file: no such file" in report.lost[0].reason
    assert files_of(index) == before
    report = Index.repair(index.path, encoder=elastic, drop_lost=True)
    assert report.whole
    assert "2.png" not in [hit.path.name for hit in contents(index, elastic, picture)[0]]
    assert Index.open(index.path).verify() == []
    assert Index.open(index.path).ingest(photos, encoder=elastic).indexed == 0


def test_without_an_encoder_damaged_embeddings_are_lost_by_name(index):
    flip(first_segment(index) / "embeddings.f32", 5)
    report = Index.repair(index.path)  # "fake-source" cannot be loaded
    assert not report.whole
    assert len(report.lost) == 9
    assert "there is no encoder" in report.lost[0].reason


def test_of_damaged_items_those_count_that_their_checksum_proves(index, photos, elastic, picture):
    hits, skipped = contents(index, elastic, picture)
    items = first_segment(index) / "items.sqlite"
    flip(items, items.read_bytes().index(b"sub/8.png") + 4, bit=0)  # "sub/9.png", which is there, too
    (photos / "2.png").unlink()  # its embedding is whole
    report = Index.repair(index.path)
    assert (report.whole, report.lost_unnamed) == (False, 0)
    assert [(file.path, file.reason) for file in report.lost] == [
        (photos / "sub" / "9.png", "its record is damaged; index it again")
    ]
    assert Index.repair(index.path, drop_lost=True).embedded == 0
    assert Index.open(index.path).verify() == []
    found, still_skipped = contents(index, elastic, picture)
    assert {hit.path.name for hit in hits} - {hit.path.name for hit in found} == {"8.png"}
    assert (len(found), still_skipped) == (len(hits) - 1, skipped)
    assert Index.open(index.path).ingest(photos, encoder=elastic).indexed == 1


@pytest.fixture
def labelled(tmp_path, photos, elastic):
    """Pictures with metadata, and a skipped file, of one list."""
    (photos / "bad.png").write_text("no picture")
    lines = [f"{number}.png,{100 + number}\n" for number in range(1, 6)]
    (photos / "list.csv").write_text("path,price\n" + "".join(lines) + "bad.png,7\n")
    return Index.build(photos / "list.csv", encoder=elastic, path=tmp_path / "labelled.index")


@pytest.mark.parametrize(
    ("of", "what", "bit"), [("3.png", b'"price": 103', 3), ("bad.png", b"bad.png", 0), ("bad.png", b'"price": 7', 1)]
)
def test_no_damaged_record_is_given_a_new_hash(labelled, elastic, of, what, bit):
    [items] = labelled.path.glob("segments/*/items.sqlite")
    flip(items, items.read_bytes().index(what) + (9 if what.startswith(b'"') else 0), bit=bit)
    report = Index.repair(labelled.path, encoder=elastic)
    assert (report.whole, len(report.lost), report.lost_unnamed) == (False, 1, 0)
    assert Index.repair(labelled.path, encoder=elastic, drop_lost=True).whole
    index = Index.open(labelled.path)
    kept = {path.name: hit for path, hit in by_path(index, elastic).items()}
    assert index.verify() == []
    assert kept == {f"{n}.png": {"price": 100 + n} for n in range(1, 6) if f"{n}.png" != of}
    assert len(index.info().skipped) == (of != "bad.png")


def by_path(index, elastic):
    retriever = Retriever.open(index.path, encoder=elastic)
    return {hit.path: hit.metadata for number in list(retriever.paths())[:1] for hit in retriever.search(number, k=99)}


def test_an_id_that_was_changed_by_damage_takes_no_other_pictures_place(labelled, elastic):
    [items] = labelled.path.glob("segments/*/items.sqlite")
    paths = Retriever.open(labelled.path, encoder=elastic).paths()
    data = bytearray(items.read_bytes())
    record = data.index(b"5.png")
    place = data.rindex(bytes([next(number for number, path in paths.items() if path.name == "5.png")]), 0, record - 20)
    for at in range(
        place, record
    ):  # the id stands before the record; whichever byte it is, nothing is taken for another
        for bit in range(3):
            flip(items, at, bit=bit)
            report = Index.repair(labelled.path, encoder=elastic)
            assert not report.whole or Retriever.open(labelled.path, encoder=elastic).paths() == paths
            assert report.whole == (report.lost_unnamed + len(report.lost) == 0)
            items.write_bytes(data)


def test_items_that_cannot_be_read_at_all_are_counted(index, photos, elastic):
    (first_segment(index) / "items.sqlite").write_bytes(b"x" * 8192)
    report = Index.repair(index.path, encoder=elastic)
    assert (report.whole, report.lost_unnamed) == (False, 9)
    assert Index.repair(index.path, encoder=elastic, drop_lost=True).whole
    after = Index.open(index.path)
    assert after.verify() == []
    assert after.ingest(photos, encoder=elastic).indexed == 9


def test_lost_deletions_are_told_and_ids_stay_single(index, photos, elastic, picture):
    (photos / "1.png").write_bytes(picture(90))
    index.ingest(photos, encoder=elastic)
    for path in (index.path / "deletions").iterdir():
        path.unlink()
    report = Index.repair(index.path, encoder=elastic)
    assert report.whole
    assert "may be back" in report.damage[0]
    assert Index.open(index.path).verify() == []
    found = Retriever.open(index.path, encoder=elastic).search(picture(90), k=1)
    assert (found[0].path.name, round(found[0].score, 5)) == ("1.png", 1.0)


def test_a_damaged_newer_record_counts_where_the_deletion_of_the_older_is_lost(index, photos, elastic, picture):
    (photos / "1.png").write_bytes(picture(90))
    index.ingest(photos, encoder=elastic)
    for path in (index.path / "deletions").iterdir():
        flip(path, 0)
    newest = read_manifest(index.path, read_pointer(index.path)).segments[-1].name
    flip(index.path / "segments" / newest / "embeddings.f32", 0)
    report = Index.repair(index.path, encoder=elastic)
    assert (report.whole, report.embedded, report.lost) == (True, 1, ())
    assert Index.open(index.path).verify() == []
    found = Retriever.open(index.path, encoder=elastic).search(picture(90), k=1)
    assert (found[0].path.name, round(found[0].score, 5)) == ("1.png", 1.0)


def test_what_was_never_published_is_removed_and_not_called_lost(index, photos, elastic, monkeypatch, picture):
    expected = contents(index, elastic, picture)
    (photos / "more.png").write_bytes(picture(60))
    with monkeypatch.context() as patched:
        patched.setattr(retrieval.manifest, "write_atomic", interrupted)  # a kill before CURRENT is replaced
        patched.setattr(GenerationWriter, "catch_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.ingest(photos, encoder=elastic)
    assert index.verify() == []
    report = Index.repair(index.path)
    assert (report.whole, report.damage, report.lost, report.lost_unnamed) == (True, (), (), 0)
    assert len(report.removed) == 3  # the manifest, its copy and the segment
    assert contents(index, elastic, picture) == expected


def interrupted(*_):
    raise KeyboardInterrupt


def test_of_two_damaged_records_of_one_picture_the_newer_counts(index, photos, elastic, picture):
    (photos / "3.png").write_bytes(picture(3))  # its deletion will be lost
    (photos / "1.png").rename(photos / "moved.png")
    index.ingest(photos, encoder=elastic, delete=True)
    for path in (index.path / "deletions").iterdir():
        path.unlink()
    for path in index.path.glob("segments/*/embeddings.f32"):
        flip(path, 5)
    report = Index.repair(index.path, encoder=elastic)
    assert (report.whole, report.lost) == (True, ())
    assert "moved.png" in {hit.path.name for hit in contents(index, elastic, picture)[0]}


def test_a_truncated_manifest_falls_back_to_an_older_generation_and_says_so(index, photos, elastic):
    os.truncate(manifest_of(index), 100)
    os.truncate(copy_of_manifest(index), 200)
    before = files_of(index)
    report = Index.repair(index.path, encoder=elastic)
    assert not report.whole
    assert len(report.lost) + report.lost_unnamed > 0
    assert files_of(index) == before
    report = Index.repair(index.path, encoder=elastic, drop_lost=True)
    assert report.whole
    assert any("is the newest that can be used" in sentence for sentence in report.damage)
    assert Index.open(index.path).verify() == []


@pytest.mark.parametrize("version", [b"0", b"3.0"])
def test_a_manifest_that_was_published_with_a_bad_field_falls_back_to_an_older_generation(index, elastic, version):
    path = manifest_of(index)
    data = path.read_bytes().replace(b'"format_version": 3', b'"format_version": ' + version)
    path.write_bytes(data)
    copy_of_manifest(index).write_bytes(data)
    (index.path / "CURRENT").write_text(f"{path.name} {hashlib.sha256(data).hexdigest()}\n")
    assert Index.repair(index.path, encoder=elastic).lost  # what only the bad one named
    report = Index.repair(index.path, encoder=elastic, drop_lost=True)
    assert report.whole
    assert "which is unknown" in report.damage[0]
    assert Index.open(index.path).verify() == []


def test_the_one_manifest_of_a_compacted_index_is_mended_whatever_happens_to_it(index, elastic, picture):
    index.compact()
    expected, generations = contents(index, elastic, picture), index.path / "generations"
    name = manifest_of(index).name
    assert {path.name for path in generations.iterdir()} == {name, name.replace(".", ".copy.")}
    flip(generations / name, 60)
    flip(generations / name, 700)
    with pytest.raises(DamagedFileError, match="try matvit repair"):
        Index.open(index.path)
    report = Index.repair(index.path)
    assert (report.whole, report.damage) == (True, (f"{generations / name}: is not what was published",))
    assert contents(index, elastic, picture) == expected


def test_an_index_without_a_copy_is_sound_and_its_next_generation_has_one(index, photos, elastic):
    copy_of_manifest(index).unlink()
    assert (index.verify(), Index.repair(index.path).damage) == ([], ())
    index.delete([photos / "1.png"])
    assert copy_of_manifest(index).read_bytes() == manifest_of(index).read_bytes()
    manifest_of(index).write_bytes(b"")
    assert Index.repair(index.path).whole


def test_an_index_without_any_readable_manifest_is_refused_and_kept(index):
    for path in (index.path / "generations").iterdir():
        path.write_bytes(b"?")
    before = files_of(index)
    with pytest.raises(IndexFormatError, match="no manifest can be read"):
        Index.repair(index.path)
    assert files_of(index) == before


def test_something_else_is_refused(tmp_path):
    with pytest.raises(IndexFormatError, match="no such index"):
        Index.repair(tmp_path / "none")


def test_a_next_id_below_the_ids_is_found_and_raised(index):
    path = manifest_of(index)
    data = re.sub(rb'"next_id": *[0-9]+', b'"next_id": 5', path.read_bytes())
    path.write_bytes(data)
    copy_of_manifest(index).write_bytes(data)
    (index.path / "CURRENT").write_text(f"{path.name} {hashlib.sha256(data).hexdigest()}\n")
    assert len(index.verify()) >= 1
    report = Index.repair(index.path)
    assert report.whole
    assert "never given away" in report.damage[0]
    assert Index.open(index.path).verify() == []


def test_a_newer_index_is_refused_not_rolled_back(index):
    from retrieval.files import sha256_bytes

    path = manifest_of(index)
    data = path.read_bytes().replace(b'"format_version": 3', b'"format_version": 9')
    path.write_bytes(data)
    (index.path / "CURRENT").write_bytes(f"{path.name} {sha256_bytes(data)}\n".encode())
    with pytest.raises(IndexFormatError, match="format version 9, newer than"):
        Index.repair(index.path)


@pytest.mark.parametrize("name", ["CURRENT", "writer.lock", "generations", "segments", "deletions", "cache", "upgrade"])
def test_what_is_of_another_kind_is_told_by_one_sentence_whoever_meets_it(index, photos, elastic, name):
    path = index.path / name
    if name in ("CURRENT", "writer.lock"):
        path.unlink()
        path.mkdir()
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.write_text("something else")
    before = files_of(index)
    kind = "regular file" if path.is_dir() else "folder"
    sentence = f"{path}: is not a {kind}; put the index's own in its place, or move it away and run: matvit repair"
    assert index.verify() == [f"{sentence} {index.path}"]
    for attempt in (
        lambda: Index.repair(index.path, encoder=elastic, drop_lost=True),
        lambda: Index.open(index.path).ingest(photos, encoder=elastic),
    ):
        with pytest.raises(DamagedFileError) as caught:
            attempt()
        assert str(caught.value) == f"{sentence} {index.path}"
    assert files_of(index) == before
    path.rename(index.path.with_name("moved away"))
    if name == "generations":  # as the sentence says
        with pytest.raises(IndexFormatError, match="no manifest can be read"):
            Index.repair(index.path, encoder=elastic)
        return
    assert (Index.repair(index.path, encoder=elastic).lost_unnamed > 0) == (name == "segments")


@pytest.mark.parametrize("name", ["CURRENT", "writer.lock", "generations", "segments", "deletions", "cache", "upgrade"])
def test_a_link_in_an_index_is_refused_and_what_it_leads_to_stays(tmp_path, index, photos, elastic, name):
    path, victim = index.path / name, tmp_path / "victim"
    if path.is_dir() or name in ("cache", "upgrade"):
        victim.mkdir()
        (victim / "CURRENT").write_text("precious")
        shutil.rmtree(path, ignore_errors=True)
    else:
        victim.write_text("precious")
        path.unlink()
    path.symlink_to(victim)
    for attempt in (
        index.compact,
        lambda: Index.repair(index.path, encoder=elastic, drop_lost=True),
        lambda: Index.open(index.path).ingest(photos, encoder=elastic),
    ):
        with pytest.raises(DamagedFileError, match=f"{name}: is a link, not a "):
            attempt()
    assert "is a link" in index.verify()[0]
    assert (victim / "CURRENT" if victim.is_dir() else victim).read_text() == "precious"


def test_a_lock_of_two_names_is_replaced_and_never_overwritten(tmp_path, index):
    (tmp_path / "precious").write_text("precious")
    (index.path / "writer.lock").unlink()
    (index.path / "writer.lock").hardlink_to(tmp_path / "precious")
    index.compact()
    assert (index.path / "writer.lock").read_text() == f"{os.getpid()}\n"
    assert (tmp_path / "precious").read_text() == "precious"


def test_an_index_and_its_copy_by_hard_links_are_written_apart(tmp_path, index, photos, elastic):
    copy = tmp_path / "copy.index"
    with writer_lock(index.path):
        shutil.copytree(index.path, copy, copy_function=os.link)
        with pytest.raises(IndexLockedError, match=r"to this index, or to one that shares files with it \(cp -l\)"):
            Index.open(copy).compact()
    before = {path: path.read_bytes() for path in index.path.rglob("*") if path.is_file()}
    with writer_lock(copy):
        Index.open(copy)
        with writer_lock(index.path):
            pass
    Index.open(copy).set_search("exact")
    Index.open(copy).delete(Index.open(copy)._snapshot.segments[0].live_ids()[0])
    assert {path: path.read_bytes() for path in index.path.rglob("*") if path.is_file()} == before
    assert index.verify() == Index.open(copy).verify() == []


def test_a_stray_link_in_an_index_is_removed_and_not_what_it_leads_to(tmp_path, index):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").touch()
    for name in (".tmp-1-x", "segments/x", "generations/.tmp-1-x"):
        (index.path / name).symlink_to(tmp_path / "victim")
    index.compact()
    assert not any(path.is_symlink() for path in index.path.rglob("*"))
    assert (tmp_path / "victim" / "precious").exists()


@contextmanager
def open_files(spare: int) -> Iterator[None]:
    """While the block runs, no more than `spare` files can be opened at one time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(spare):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_are_an_error_and_no_damage(index, elastic, picture):
    expected = contents(index, elastic, picture)
    flip(first_segment(index) / "embeddings.f32", 5)
    refused = 0
    for spare in range(40):
        before = files_of(index)
        try:
            with open_files(spare):
                assert len(index.verify()) == 1
                report = Index.repair(index.path, encoder=elastic, drop_lost=True)
        except MatVitError as error:
            assert re.search("open files|unable to open", str(error))  # noqa: PT017 - the last attempt must succeed
            assert not isinstance(error, DamagedFileError)  # noqa: PT017
            assert files_of(index) == before
            refused += 1
        else:
            assert (report.lost, report.lost_unnamed, report.whole) == ((), 0, True)
            break
    assert refused >= 3
    assert contents(index, elastic, picture) == expected


def test_no_picture_is_lost_that_could_only_not_be_opened_now(index, elastic, monkeypatch):
    flip(first_segment(index) / "embeddings.f32", 5)
    before = files_of(index)
    real = retrieval.reembed.open_picture

    def open_picture(place):
        if place.endswith("2.png"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(place)

    with monkeypatch.context() as patched:
        patched.setattr(retrieval.reembed, "open_picture", open_picture)
        with pytest.raises(IngestError, match="Too many open files"):
            Index.repair(index.path, encoder=elastic, drop_lost=True)
    assert files_of(index) == before
    assert Index.repair(index.path, encoder=elastic).whole


def test_a_disk_that_cannot_give_a_file_is_damage(index, elastic, monkeypatch):
    broken = first_segment(index) / "embeddings.f32"
    real = retrieval.files.sha256_file

    def read(path):
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(retrieval.files, "sha256_file", read)
    assert "check the disk" in index.verify()[0]
    assert Index.repair(index.path, encoder=elastic).embedded == 9


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_repair_that_fails_at_any_step_makes_nothing_worse(index, elastic, picture, failing, name):
    expected = contents(index, elastic, picture)
    flip(first_segment(index) / "embeddings.f32", 5)
    for at in range(30):
        folder = Path(shutil.copytree(index.path, index.path.with_name(f"at-{at}")))
        with failing(name, at=at, code=errno.EIO):
            try:
                Index.repair(folder, encoder=elastic)
            except Exception as error:
                assert "Input/output error" in str(error)  # noqa: PT017
            else:
                break
        assert Index.repair(folder, encoder=elastic).whole
        assert contents(Index.open(folder), elastic, picture) == expected
    assert at >= 3


@pytest.mark.parametrize("sample", [-1, 1.5, "2", True, None])
def test_a_sample_of_no_number_is_one_sentence(index, sample):
    with pytest.raises(IngestError, match="is no number of pictures; give one from 0 on"):
        index.verify(sample=sample)
