"""Decoding and encoding at the same time: neither waits for the other, order is kept, memory is bounded."""

from __future__ import annotations

import gc
import hashlib
import threading
from contextlib import closing
from functools import partial

import numpy as np
import pytest

import retrieval.pipeline
from matvit import threads
from retrieval.loading import Task
from retrieval.locations import open_with_status
from retrieval.pipeline import embed_all

WAIT = 30  # seconds until a test gives up


def tasks(paths):
    for path in paths:
        yield Task(full_path=str(path), root="", path=b"", known=None, open=partial(open_with_status, str(path)))


def names(results):
    return [one.loaded.path.name if hasattr(one.loaded, "path") else one.loaded.task.full_path[-5:] for one in results]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "AHEAD", 4)


def test_everything_comes_back_in_order_whatever_became_of_it(photos, elastic, small_batches, picture):
    (photos / "3.png").write_text("no picture")
    (photos / "5.png").unlink()
    files = [photos / f"{n}.png" for n in range(7)]
    held = {hashlib.sha256(picture(2)).hexdigest(): "known"}
    results = list(embed_all(tasks(files), encoder=elastic.encoder(), held=held.get))
    assert names(results) == [path.name for path in files]
    assert results[2].loaded.same == "known"
    for number, one in enumerate(results):
        if number in {2, 3, 5}:
            assert one.embedding is None
        else:
            np.testing.assert_allclose(one.embedding, elastic.encoder().embed([picture(number)])[0], rtol=1e-5)


def test_pictures_are_decoded_while_others_are_encoded(photos, elastic, small_batches):
    later = threading.Event()

    class Encoder(type(elastic.encoder())):
        def preprocess(self, images):
            if images[0] == (photos / "4.png").read_bytes():
                later.set()
            return super().preprocess(images)

        def encode(self, pixels):
            assert later.wait(WAIT)  # the first batch ends only when a picture of the third was decoded
            return super().encode(pixels)

    encoder = Encoder(elastic.shape.spec(), elastic.space_id)
    files = [photos / f"{n}.png" for n in range(7)]
    assert len(list(embed_all(tasks(files), encoder=encoder, held={}.get))) == 7


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_as_many_batches_are_encoded_at_once_as_there_are_threads(photos, elastic, monkeypatch, cores):
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 7)
    together = threading.Barrier(cores)

    class Encoder(type(elastic.encoder())):
        def encode(self, pixels):
            together.wait(WAIT)
            return super().encode(pixels)

    files = [photos / f"{n}.png" for n in range(7)] * cores
    encoder = Encoder(elastic.shape.spec(), elastic.space_id)
    assert len(list(embed_all(tasks(files), encoder=encoder, held={}.get))) == 7 * cores


def test_no_more_is_taken_than_may_wait_while_nothing_is_consumed(photos, elastic, small_batches):
    taken = []

    def counted():
        for task in tasks([photos / f"{n % 7}.png" for n in range(100)]):
            taken.append(task)
            yield task

    with closing(embed_all(counted(), encoder=elastic.encoder(), held={}.get)) as results:
        next(results)
        batches = threads.batches_at_once() + 1
        assert len(taken) <= retrieval.pipeline.AHEAD + batches * retrieval.pipeline.BATCH


@pytest.mark.parametrize(("frozen", "are_kept"), [(0, True), (375, True), (100_000, False)])
def test_what_is_there_before_is_kept_from_pythons_collector_unless_someone_decided(
    photos, elastic, monkeypatch, frozen, are_kept
):
    """375: Python 3.12's own, at its start."""
    count = gc.get_freeze_count
    gc.unfreeze()
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    with closing(embed_all(tasks([photos / "1.png"]), encoder=elastic.encoder(), held={}.get)) as results:
        next(results)
        assert (count() > 100_000) == are_kept
    assert count() == 0


def test_closing_it_begins_nothing_more_and_leaves_no_thread(photos, elastic, small_batches):
    before = threading.active_count()
    encoded = []

    class Encoder(type(elastic.encoder())):
        def encode(self, pixels):
            encoded.append(len(pixels))
            return super().encode(pixels)

    encoder = Encoder(elastic.shape.spec(), elastic.space_id)
    with closing(embed_all(tasks([photos / "1.png"] * 100), encoder=encoder, held={}.get)) as results:
        next(results)
    assert threading.active_count() == before
    assert len(encoded) <= threads.batches_at_once() + 1


def test_what_comes_before_a_batch_that_fails_is_given(photos, elastic, small_batches):
    fifth = elastic.encoder().preprocess([photos / "4.png"])[0]

    class Encoder(type(elastic.encoder())):
        def encode(self, pixels):
            if np.array_equal(pixels[0], fifth):
                raise MemoryError
            return super().encode(pixels)

    results = embed_all(
        tasks([photos / f"{n}.png" for n in range(7)]),
        encoder=Encoder(elastic.shape.spec(), elastic.space_id),
        held={}.get,
    )
    given = []
    with pytest.raises(MemoryError):
        given.extend(results)
    assert names(given) == ["0.png", "1.png", "2.png", "3.png"]
