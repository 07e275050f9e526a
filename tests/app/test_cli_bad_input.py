"""Bad input to an index, as issue 7 lists it: counted with its reason, or one sentence; nothing is lost.

Empty folders, missing files and encoders that do not match are in test_cli_errors.py, odd file names in
test_cli_results.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

import retrieval.locations


def refused(outcome, *words):
    """One sentence that holds all `words`."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.fixture
def pictures(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "pictures")


@pytest.fixture
def build(run, pictures, checkpoint, tmp_path):
    """Indexes the pictures again; gives what `matvit index --json` printed."""

    def index(*options):
        done = run("index", pictures, "--index", tmp_path / "i", "--encoder", checkpoint, "--json", *options)
        return done.code, done.json

    return index


def skipped(report):
    return {Path(file["path"]).name: file["reason"] for file in report["skipped"]}


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "writer.lock"}


def test_a_folder_of_other_files_holds_no_pictures(run, checkpoint, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    done = run("index", tmp_path / "notes", "--index", tmp_path / "i", "--encoder", checkpoint)
    refused(done, "notes", "holds no pictures")
    assert not (tmp_path / "i").exists()


def test_an_unreadable_file_is_counted_and_tried_again(build, pictures, monkeypatch):
    def locked(place):
        if place.endswith("0.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)  # chmod does not stop root
        return open_file(place)

    open_file = retrieval.locations.open_file
    with monkeypatch.context() as patch:
        patch.setattr(retrieval.locations, "open_file", locked)
        code, report = build()
    assert (code, report["indexed"], skipped(report)) == (0, 6, {"0.png": "may not be read"})
    assert len(report["skipped"]) == 2
    assert build("--strict")[0] == 0
    assert build()[1]["unchanged"] == 8


def test_links_in_a_circle_are_followed_once_or_counted(build, pictures):
    (pictures / "cats" / "up").symlink_to("..")
    (pictures / "a.png").symlink_to("b.png")
    (pictures / "b.png").symlink_to("a.png")
    code, report = build()
    reason = "cannot be read (Too many levels of symbolic links)"
    assert (code, report["indexed"], skipped(report)) == (0, 8, {"a.png": reason, "b.png": reason})
    assert build("--strict")[0] == 1


def test_files_of_the_same_content_are_all_found(run, build, pictures, tmp_path):
    shutil.copy(pictures / "cats" / "0.png", pictures / "dogs" / "copy.png")
    assert build()[1]["indexed"] == 9
    found = run("search", pictures / "cats" / "0.png", "--index", tmp_path / "i", "-k", 2, "--json").json
    first, second = found["queries"][0]["hits"]
    assert {first["path"], second["path"]} == {str(pictures / "cats" / "0.png"), str(pictures / "dogs" / "copy.png")}
    assert (first["score"], first["id"] < second["id"]) == (second["score"], True)


def test_an_index_made_by_a_newer_version_is_refused_and_kept(run, build, pictures, tmp_path):
    build()
    index = tmp_path / "i"
    [manifest] = [path for path in (index / "generations").iterdir() if path.name in (index / "CURRENT").read_text()]
    data = manifest.read_bytes().replace(b'"format_version": 3', b'"format_version": 99')
    manifest.write_bytes(data)
    (index / "CURRENT").write_text(f"{manifest.name} {hashlib.sha256(data).hexdigest()}\n")
    before = tree(index)
    for arguments in (
        ["index", pictures, "--index", index],
        ["search", pictures / "cats" / "0.png", "--index", index],
        ["info", index],
        ["compact", index],
        ["repair", index],
        ["verify", index],
    ):
        refused(run(*arguments), "format version 99, newer than the 3 that this program reads")
    assert tree(index) == before


def test_a_folder_that_is_something_else_is_left_as_it_is(run, checkpoint, pictures, tmp_path):
    before = tree(pictures)
    refused(run("index", pictures, "--index", pictures, "--encoder", checkpoint), pictures, "holds other files")
    refused(run("compact", pictures), pictures, "no index")
    refused(run("verify", pictures), pictures, "neither a checkpoint nor an index")
    assert tree(pictures) == before


def test_a_full_disk_is_one_sentence_and_the_index_stays_as_it_was(run, build, pictures, tmp_path, monkeypatch):
    build()
    shutil.copy(pictures / "cats" / "0.png", pictures / "more.png")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(
            run("index", pictures, "--index", tmp_path / "i"), "No space left on device", "nothing that was published"
        )
    assert run("verify", tmp_path / "i").code == 0
    assert run("info", tmp_path / "i", "--json").json["items"] == 8
    assert build()[1]["indexed"] == 1


def test_damaged_metadata_leave_the_picture_and_the_terminal_alone(build, pictures):
    spoilt = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 3, 99, 9999)
    Image.new("RGB", (32, 32), "red").save(pictures / "odd.jpg", exif=spoilt)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert build()[1]["indexed"] == 9
    assert not [warning for warning in told if "PIL" in warning.filename]


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_path_where_nothing_is_could_have_been_an_index(run, tmp_path, command):
    refused(run(command, tmp_path / "gone.index"), "gone.index: no such checkpoint, nor an index; check the path")


def test_a_picture_in_a_shard_can_be_searched_with(run, index, photos, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(photos / "cats" / "1.png", "a/1.png")
    found = run("search", tmp_path / "shard.tar#a/1.png", "--index", index, "-k", 1, "--json").json["queries"][0]
    assert found["query"] == str(tmp_path / "shard.tar#a/1.png")
    assert found["hits"][0]["path"] == str(photos / "cats" / "1.png")
    refused(run("search", tmp_path / "shard.tar#b.png", "--index", index), "shard.tar#b.png: ")
    refused(run("search", tmp_path / "gone.tar#b.png", "--index", index), "gone.tar#b.png: no such file")
