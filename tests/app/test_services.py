"""What the commands and the page call, where a command line cannot reach: full disks and second processes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

import matvit_data
import retrieval.ingest
from matvit_app import services
from retrieval import Index, IndexLockedError, IngestError
from retrieval.lock import writer_lock
from retrieval.writer import GenerationWriter


@pytest.mark.parametrize("published", [0, 1])
def test_a_disk_that_fills_up_keeps_the_index_as_far_as_it_came(checkpoint, photos, tmp_path, monkeypatch, published):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_the_disk(writer, *arguments, **named):
        with monkeypatch.context() as patch:
            if writer.manifest.generation > published:
                patch.setattr(os, "fsync", full)
            publish(writer, *arguments, **named)

    publish = GenerationWriter.publish
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    monkeypatch.setattr(GenerationWriter, "publish", fill_the_disk)
    with pytest.raises(IngestError, match="No space left on device"):
        services.ingest([photos], path=tmp_path / "i", checkpoint=str(checkpoint))
    assert (tmp_path / "i").exists() == (published > 0)
    if published:
        assert services.index_info(tmp_path / "i").items == 4
        assert services.verify(str(tmp_path / "i")).problems == ()


def test_who_comes_second_to_a_new_index_is_told_who_writes(checkpoint, photos, tmp_path, monkeypatch):
    def another_process_is_faster(*arguments, **named):
        encoder = load_encoder(*arguments, **named)
        if not services.is_index(tmp_path / "i"):
            Index.create(tmp_path / "i", encoder=encoder)
            holder.enter_context(writer_lock(tmp_path / "i"))
        return encoder

    load_encoder = services.load_encoder
    monkeypatch.setattr(services, "load_encoder", another_process_is_faster)
    with ExitStack() as holder, pytest.raises(IndexLockedError, match=f"process {os.getpid()} is writing"):
        services.ingest([photos], path=tmp_path / "i", checkpoint=str(checkpoint))
    assert services.ingest([photos], path=tmp_path / "i", checkpoint=str(checkpoint)).indexed == 8


@pytest.fixture
def cache(checkpoint, tmp_path, monkeypatch):
    """Where the demo's index is made; of three pictures and the tiny encoder."""
    (tmp_path / "demo" / "images").mkdir(parents=True)
    for number in range(3):
        pixels = np.full((20, 20, 3), 80 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "demo" / "images" / f"{number}.png")
    monkeypatch.setattr(matvit_data, "demo_folder", lambda: tmp_path / "demo")
    monkeypatch.setattr(services, "DEFAULT_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_demos_at_a_time_never_meet_half_an_index(cache, monkeypatch):
    def build(images, **named):
        meeting.wait()  # both have found nothing, and build
        return real(images, **named)

    def demo():
        path = services.demo_index()
        found.append(Index.open(path).info().items)

    real, meeting, found = Index.build, threading.Barrier(2), []
    monkeypatch.setattr(Index, "build", build)
    demos = [threading.Thread(target=demo) for _ in range(2)]
    for thread in demos:
        thread.start()
    for thread in demos:
        thread.join()
    assert found == [3, 3]
    assert len(list(cache.iterdir())) == 1


def test_a_demo_beside_one_that_brings_the_index_up_to_date_uses_it(cache):
    path = services.demo_index()
    with writer_lock(path):
        assert services.demo_index() == path
    assert Index.open(path).verify() == []


def test_a_demo_index_that_is_damaged_or_only_a_folder_is_made_anew(cache):
    path = services.demo_index()
    for harm in ((path / "CURRENT").unlink, lambda: shutil.rmtree(path / "segments")):
        harm()
        assert Index.open(services.demo_index()).info().items == 3
    assert len(list(cache.iterdir())) == 1


def test_a_demo_that_is_interrupted_leaves_nothing(cache, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        services.demo_index()
    assert list(cache.iterdir()) == []


def test_what_an_index_holds_is_of_one_generation_though_a_writer_moves_on_meanwhile(
    checkpoint, photos, tmp_path, monkeypatch
):
    services.ingest([photos], path=tmp_path / "i", checkpoint=str(checkpoint))
    items, fields = Index.open(tmp_path / "i").info().items, Index.fields

    def fields_after_a_writer(index):
        monkeypatch.setattr(Index, "fields", fields)
        Index.open(index.path).delete([0])
        Index.open(index.path).compact()
        return index.fields()

    monkeypatch.setattr(Index, "fields", fields_after_a_writer)
    found = services.contents_of(str(tmp_path / "i"))
    assert found["items"] == found["metadata"]["label"]["pictures"] == items - 1
