"""What is read of a file, and what is not read."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image, features

import retrieval.loading
from matvit.errors import ImageError
from retrieval import Index
from retrieval.loading import Loader, Task
from retrieval.locations import open_with_status


def task(path):
    return Task(full_path=str(path), root="", path=b"", known=None, open=partial(open_with_status, str(path)))


def test_a_large_file_that_is_no_picture_is_not_read_into_memory(tmp_path, elastic):
    film = tmp_path / "film.jpg"
    with film.open("wb") as file:
        file.truncate(40 * 2**20)
    tracemalloc.start()
    try:
        loaded = Loader(elastic.encoder(), {}.get).load(task(film))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loaded.reason == "not a picture in a supported format"
    assert len(loaded.content_sha256) == 64
    assert peak < 4 * 2**20


@pytest.mark.parametrize(("limit", "alone"), [(1, True), (10**9, False)])
def test_pictures_that_need_all_the_memory_are_decoded_one_at_a_time(photos, elastic, monkeypatch, limit, alone):
    monkeypatch.setattr(retrieval.loading, "MEMORY_BYTES", limit)
    together, seen = [], []

    class Slow(type(elastic.encoder())):
        def preprocess(self, images):
            together.append(1)
            seen.append(len(together))
            time.sleep(0.1)
            together.pop()
            return super().preprocess(images)

    loader = Loader(Slow(elastic.shape.spec(), elastic.space_id), {}.get)
    threads = [threading.Thread(target=loader.load, args=[task(photos / f"{n}.png")]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(seen) == 1) == alone


def test_other_files_beside_the_pictures_are_left_out_unless_they_are_named(photos, elastic, tmp_path, picture):
    for name in ("notes.md", "film.mp4", "no-suffix"):
        (photos / name).write_bytes(picture(70) if name == "no-suffix" else b"something")
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    assert (index.info().items, index.info().skipped) == (10, ())
    report = index.ingest([photos / "no-suffix", photos / "notes.md"])
    assert (report.indexed, [file.path.name for file in report.skipped]) == (1, ["notes.md"])


def test_content_that_is_held_is_not_decoded(photos, elastic, monkeypatch):
    encoder = elastic.encoder()
    first = Loader(encoder, {}.get).load(task(photos / "1.png"))
    assert (first.width, first.height, first.pixels.shape) == (12, 10, (1, 3, 8, 8))
    monkeypatch.setattr(type(encoder), "preprocess", None)
    again = Loader(replace(encoder), {first.content_sha256: "known"}.get).load(task(photos / "1.png"))
    assert (again.same, again.pixels) == ("known", None)


def test_pictures_of_kinds_that_are_not_read_are_listed_with_what_to_do(photos, elastic, tmp_path):
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (photos / "IMG_2.cr2").write_bytes(b"II*\0" + bytes(100))
    Image.new("RGB", (9, 9)).save(photos / "IMG_3.dng", "TIFF")  # raws hold a small preview
    index = Index.create(tmp_path / "photos.index", encoder=elastic)
    report = index.ingest(photos)
    skipped = {file.path.name: file.reason for file in report.skipped}
    assert "needs converting to JPEG" in skipped["IMG_1.HEIC"]
    assert "is a camera raw picture, which needs" in skipped["IMG_2.cr2"]
    assert "is a camera raw picture, which needs" in skipped["IMG_3.dng"]


def fail(error):
    def preprocess(self, images):
        raise error

    return preprocess


@pytest.mark.parametrize("want", ["memory", "decoder", "format"])
def test_a_picture_that_this_machine_could_not_decode_is_tried_again_by_the_next_run(
    photos, elastic, tmp_path, monkeypatch, want
):
    index = Index.create(tmp_path / "i", encoder=elastic)
    with monkeypatch.context() as patch:
        if want == "memory":
            patch.setattr(Image.Image, "convert", refuse_memory)
        elif want == "decoder":
            patch.delattr(Image.core, "zip_decoder")
        else:
            patch.setitem(Image.OPEN, "PNG", (None, lambda beginning: "PNG support not installed"))
            patch.setattr(features, "check", lambda name: name != "webp")
        report = index.ingest(photos / "1.png")
    [skipped] = report.skipped
    expected = {"memory": "not enough memory", "decoder": "decoder zip not available", "format": "supported format"}
    assert expected[want] in skipped.reason
    assert index.info().skipped == report.skipped
    assert index.ingest(photos / "1.png").indexed == 1
    assert (index.info().skipped, index.verify()) == ((), [])


def refuse_memory(self, *arguments):
    raise MemoryError


def test_a_picture_that_was_called_damaged_is_decoded_again_once_it_is_touched(photos, elastic, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "i", encoder=elastic)
    encoder = type(elastic.encoder())
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "preprocess", fail(ImageError(what="damaged picture", where="x", fix="mend it")))
        assert index.ingest(photos / "1.png").indexed == 0
    assert [file.path.name for file in index.info().skipped] == ["1.png"]
    assert (index.ingest(photos / "1.png").indexed, len(index.info().skipped)) == (0, 1)  # not decoded again
    os.utime(photos / "1.png", ns=(1, 1))
    assert (index.ingest(photos / "1.png").indexed, index.info().skipped, index.verify()) == (1, (), [])
