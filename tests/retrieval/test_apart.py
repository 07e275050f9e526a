"""Decoding in processes, for an encoder on another device: the same index as in threads, whatever becomes of them."""

from __future__ import annotations

import ast
import hashlib
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import matvit.decoding
import retrieval.loading
import retrieval.pipeline
from matvit.decoding import ANY_MEMORY, Decoder, Decoders, _Worker
from retrieval import Index
from retrieval.loading import Task
from retrieval.locations import open_with_status
from retrieval.snapshot import Snapshot

HELPERS = runpy.run_path(str(Path(__file__).with_name("mutations.py")))
CONFTEST = Path(__file__).with_name("conftest.py")
FAKE = runpy.run_path(str(CONFTEST))
PREPROCESSING = FAKE["PREPROCESSING"]
PICTURES = 200
WAIT = 60  # seconds until a test gives up
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")

SCRIPT = f"""
import runpy, signal, sys, time
import retrieval.ingest
from retrieval import Index

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
helpers = runpy.run_path({str(CONFTEST)!r})
retrieval.ingest.PUBLISH_ITEMS = 8
retrieval.pipeline.BATCH = retrieval.pipeline.APART_BATCH = 4

class Apart(helpers["FakeEncoder"]):
    preprocessing = helpers["PREPROCESSING"]

    def for_batches(self):
        return self

    def encode(self, pixels):
        time.sleep(float(sys.argv[3]))
        return super().encode(helpers["PREPROCESSING"].normalise(pixels))

class Elastic(helpers["FakeElastic"]):
    def encoder(self, spec=None):
        return Apart(self.shape.spec(spec), self.space_id)

print("begins", flush=True)
print(Index.build(sys.argv[1], encoder=Elastic(), path=sys.argv[2]), flush=True)
"""


@dataclass
class Elastic(FAKE["FakeElastic"]):
    """Its encoder says that it is on another device."""

    def encoder(self, spec=None):
        return Apart(self.shape.spec(spec), self.space_id)


class Apart(FAKE["FakeEncoder"]):
    preprocessing = PREPROCESSING

    def for_batches(self):
        return self

    def preprocess(self, images):
        raise AssertionError

    def encode(self, pixels):
        assert pixels.dtype == np.uint8
        return super().encode(PREPROCESSING.normalise(pixels))


def task(path):
    return Task(full_path=path, root="", path=b"", known=None, open=partial(open_with_status, path))


def start(tmp_path, photos, *, seconds=0.0, **options):
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(photos), str(tmp_path / "i"), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def children(pid):
    """Processes that `pid` has started, and that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(true):
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def content(path):
    """All that an index says of its files, and their embeddings."""
    rows = []
    for segment, item in Snapshot.open(path).live_items():
        values = {field.name: getattr(item, field.name) for field in fields(item) if field.name != "row"}
        rows.append((values, None if item.row is None else segment.embeddings()[item.row].tobytes()))
    return rows


def report(found):
    return found.indexed, found.unchanged, found.deleted, found.skipped


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
@pytest.mark.parametrize(("small", "memory"), [(2**18, 2**25), (1000, 2**25), (2**18, 20_000)])
def test_mutated_pictures_give_the_same_index_and_reasons_either_way(tmp_path, elastic, monkeypatch, small, memory):
    monkeypatch.setattr(retrieval.loading, "SMALL_BYTES", small)
    monkeypatch.setattr(retrieval.loading, "SMALL_MEMORY", memory)
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(PICTURES):
        name, data = HELPERS["mutated"](seed)
        (folder / name).write_bytes(data)
    (folder / "empty.jpg").touch()
    (folder / "named so.heic").write_text("a" * 3000)
    (folder / "again.png").write_bytes(HELPERS["mutated"](0)[1])
    threads, apart = tmp_path / "threads", tmp_path / "apart"
    for path in (threads, apart):
        Index.create(path, encoder=elastic)
    for _ in range(2):
        reports = [
            report(Index.open(path).ingest(folder, encoder=one))
            for path, one in ((threads, elastic), (apart, Elastic()))
        ]
        assert reports[0] == reports[1]
        assert content(threads) == content(apart)
        (folder / "again.png").write_bytes(HELPERS["mutated"](1)[1])
        (folder / "touched.png").write_bytes(HELPERS["mutated"](2)[1])
    assert children(os.getpid()) == []


def test_pixels_of_a_worker_equal_the_encoders_bit_by_bit(photos, picture):
    decoder = Decoder(preprocessing=PREPROCESSING, size=8)
    with Decoders(decoder) as decoders:
        found = decoders.decode([(picture(n), str(n)) for n in range(3)], memory=ANY_MEMORY)
    for number, one in enumerate(found):
        assert (one.width, one.height, one.error) == (12, 10, None)
        expected = PREPROCESSING(picture(number), size=8)
        np.testing.assert_array_equal(PREPROCESSING.normalise(one.pixels), expected, strict=True)


def test_a_worker_reads_named_files_and_decodes_those_that_are_wanted(tmp_path, picture):
    contents = {f"{n}\n\udcff.png": picture(n) for n in range(4)}
    contents |= {"large.png": picture(5) + bytes(10_000), "empty.png": b"", "no picture.png": b"text"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    names = [str(tmp_path / name) for name in (*contents, "gone.png")]
    asked = []

    def wanted(number, file):
        asked.append(number)
        assert file.sha256 == hashlib.sha256(contents[Path(names[number]).name]).hexdigest()
        return number != 1

    with Decoders(Decoder(preprocessing=PREPROCESSING, size=8)) as decoders:
        found = decoders.read(names, largest=10_000, memory=ANY_MEMORY, wanted=wanted)
    assert asked == [0, 1, 2, 3, 6]
    assert [one is not None for one in found] == [True, False, True, True, False, False, True, False]
    for number in (0, 2, 3):
        file, decoded = found[number]
        status = Path(names[number]).stat()
        assert (file.size, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
        np.testing.assert_array_equal(decoded.pixels, PREPROCESSING.pixels(picture(number), size=8), strict=True)
    assert not found[6][1].is_picture


def test_a_worker_runs_nothing_of_the_current_folder(tmp_path, monkeypatch, picture):
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with Decoders(Decoder(preprocessing=PREPROCESSING, size=16)) as decoders:
        [found] = decoders.decode([(picture(1), "1.png")], memory=ANY_MEMORY)
        assert found.pixels is not None
        assert decoders._has_started


def test_a_file_that_gives_fewer_bytes_than_it_has_is_left_to_the_other_process():
    place = Path("/sys/devices/system/cpu/online")  # its size is said to be 4096
    if not place.exists():
        pytest.skip("no such file here")
    with Decoders(Decoder(preprocessing=PREPROCESSING, size=16)) as decoders:
        assert decoders.read([str(place)], largest=10_000, memory=ANY_MEMORY, wanted=lambda *_: True) == [None]


def test_a_file_whose_content_is_held_is_not_decoded_again(tmp_path, photos, monkeypatch):
    index = Index.create(tmp_path / "i", encoder=Elastic())
    index.ingest(photos, encoder=Elastic())
    photos.rename(tmp_path / "moved")
    decoded = []
    monkeypatch.setattr(matvit.decoding, "_unpacked", lambda _, names: decoded.extend(names) or [])
    found = index.ingest(tmp_path / "moved", encoder=Elastic(), delete=True)
    assert (found.indexed, found.unchanged, found.deleted, decoded) == (10, 0, 0, [])


def test_a_worker_imports_no_torch_and_no_index():
    code = "import sys, matvit.decoding; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "faiss", "retrieval", "pydantic", "timm"} & set(ast.literal_eval(done.stdout))


def test_a_picture_that_ends_its_worker_is_skipped_and_no_other(tmp_path, photos, monkeypatch):
    killing = """
import os, matvit.preprocess
pixels = matvit.preprocess.Preprocessing.pixels
def killed(self, data, *, size):
    return os.kill(os.getpid(), 9) if data.endswith(b"kill") else pixels(self, data, size=size)
matvit.preprocess.Preprocessing.pixels = killed
serve(**o)"""
    monkeypatch.setattr(matvit.decoding, "_CODE", matvit.decoding._CODE.removesuffix("serve(**o)") + killing)
    for number in (2, 3):
        path = photos / f"{number}.png"
        path.write_bytes(path.read_bytes() + b"kill")
    index = Index.create(tmp_path / "i", encoder=Elastic())
    found = index.ingest(photos)
    assert [(file.path.name, file.reason) for file in found.skipped] == [
        (f"{number}.png", "the process that decoded it ended (signal 9)") for number in (2, 3)
    ]
    assert found.indexed == 8
    monkeypatch.undo()
    again = index.ingest(photos, encoder=Elastic())
    assert (again.indexed, again.unchanged, again.skipped) == (2, 8, ())


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false", ""])
def test_where_no_worker_starts_this_process_decodes(tmp_path, photos, elastic, monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    found = Index.create(tmp_path / "i", encoder=Elastic()).ingest(photos)
    assert (found.indexed, found.skipped) == (10, ())
    Index.build(photos, encoder=elastic, path=tmp_path / "threads")
    assert content(tmp_path / "i") == content(tmp_path / "threads")


def test_a_script_without_a_guard_is_not_run_again_by_workers(tmp_path, photos):
    script = start(tmp_path, photos)
    out, err = script.communicate(timeout=WAIT)
    assert (script.returncode, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["begins", "<Index"]


def more(photos, picture):
    for seed in range(190):
        (photos / f"more-{seed}.png").write_bytes(picture(1000 + seed))


def test_a_kill_leaves_no_worker_and_an_index_to_go_on_with(tmp_path, photos, picture):
    more(photos, picture)
    script = start(tmp_path, photos, seconds=0.1)
    wait_until(lambda: (tmp_path / "i" / "CURRENT").exists() and Index.open(tmp_path / "i").info().items)
    workers = children(script.pid)
    assert workers
    script.kill()
    script.communicate(timeout=WAIT)
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    goes_on(tmp_path / "i", photos)


def test_ctrl_c_ends_the_workers_in_silence_and_leaves_an_index_to_go_on_with(tmp_path, photos, picture):
    more(photos, picture)
    script = start(tmp_path, photos, seconds=0.1, start_new_session=True)
    wait_until(lambda: (tmp_path / "i" / "CURRENT").exists() and Index.open(tmp_path / "i").info().items)
    workers = children(script.pid)
    assert workers
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does
    _, err = script.communicate(timeout=WAIT)
    assert err.count("Traceback") == err.count("KeyboardInterrupt\n") == 1  # the script's own
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    goes_on(tmp_path / "i", photos)


def goes_on(path, photos):
    index = Index.open(path)
    items = index.info().items
    assert 0 < items < 200
    assert index.verify() == []
    found = index.ingest(photos, encoder=Elastic())
    assert (found.indexed, found.unchanged, found.skipped) == (200 - items, items, ())


def test_workers_that_are_killed_in_mid_ingest_cost_no_picture_but_the_one_in_work(tmp_path, photos, picture):
    more(photos, picture)
    script = start(tmp_path, photos, seconds=0.05)
    for _ in range(5):
        wait_until(lambda: script.poll() is not None or children(script.pid))
        for worker in children(script.pid):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)
    _, err = script.communicate(timeout=WAIT)
    assert (script.returncode, err) == (0, "")
    info = Index.open(tmp_path / "i").info()
    assert info.items + len(info.skipped) == 200
    assert all(file.reason == "the process that decoded it ended (signal 9)" for file in info.skipped)


def test_a_worker_that_waits_ends_when_its_input_does():
    worker = _Worker(Decoder(preprocessing=PREPROCESSING, size=8))
    worker.decode([], memory=0)
    worker._asked.close()
    assert worker.end() == "exit code 0"


def test_no_more_is_taken_than_may_wait_while_nothing_is_consumed(photos, monkeypatch):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "APART_BATCH", 4)
    taken = []

    def counted():
        for number in range(200):
            path = str(photos / f"{number % 7}.png")
            taken.append(path)
            yield task(path)

    with closing(retrieval.pipeline.embed_all(counted(), encoder=Elastic().encoder(), held={}.get)) as results:
        next(results)
        assert len(taken) <= 16 + (retrieval.pipeline.APART_AT_ONCE + retrieval.pipeline.APART_WAITING) * 4


def test_batches_are_encoded_while_nothing_is_consumed(photos, monkeypatch):
    monkeypatch.setattr(retrieval.pipeline, "BATCH", 2)
    monkeypatch.setattr(retrieval.pipeline, "APART_BATCH", 4)
    encoded = []

    class Counting(Apart):
        def encode(self, pixels):
            encoded.append(len(pixels))
            return super().encode(pixels)

    encoder = Counting(Elastic().shape.spec(), "5" * 64)
    found = [task(str(photos / "1.png"))] * 200
    with closing(retrieval.pipeline.embed_all(found, encoder=encoder, held={}.get)) as results:
        next(results)
        wait_until(lambda: len(encoded) == retrieval.pipeline.APART_AT_ONCE + retrieval.pipeline.APART_WAITING)


def test_a_larger_input_makes_smaller_batches():
    sizes = {112: 128, 224: 128, 448: 41, 1024: 16}
    for size, batch in sizes.items():
        encoder = Apart(replace(FAKE["SHAPE"], image_size=size).spec(), "5" * 64)
        assert retrieval.pipeline.way_of(encoder).batch == batch


def test_an_upgrade_leaves_the_reading_of_files_to_the_workers_too(tmp_path, photos, monkeypatch):
    index = Index.build(photos, encoder=Elastic(), path=tmp_path / "i")
    monkeypatch.setattr(Decoders, "decode", None)  # any use would fail
    other = replace(Elastic(), space_id="a" * 64)
    assert (index.upgrade(other).embedded, index.verify(sample=0)) == (10, [])


def test_a_picture_that_became_a_pipe_does_not_stop_an_upgrade(tmp_path, photos):
    index = Index.build(photos, encoder=Elastic(), path=tmp_path / "i")
    (photos / "1.png").unlink()
    os.mkfifo(photos / "1.png")
    report = index.upgrade(replace(Elastic(), space_id="a" * 64))
    assert (report.embedded, [file.path.name for file in report.missing]) == (9, ["1.png"])


def test_what_wraps_an_encoder_decodes_as_it_says_itself():
    class Wrapped:
        def __init__(self, encoder):
            self.encoder = encoder

        def __getattr__(self, name):
            return getattr(self.encoder, name)

    encoder = Elastic().encoder()
    assert retrieval.pipeline.way_of(encoder).decoders is not None
    assert Wrapped(encoder).for_batches() is not None
    assert retrieval.pipeline.way_of(Wrapped(encoder)).decoders is None


def test_where_answers_find_no_memory_each_picture_is_decoded_alone_or_skipped(tmp_path, photos, monkeypatch, picture):
    real = Decoders.decode

    def read(*_, **__):
        raise MemoryError

    def decode(decoders, pictures, *, memory):
        if len(pictures) > 1 or pictures[0][0] == picture(2):
            raise MemoryError
        return real(decoders, pictures, memory=memory)

    monkeypatch.setattr(Decoders, "read", read)
    monkeypatch.setattr(Decoders, "decode", decode)
    found = Index.create(tmp_path / "i", encoder=Elastic()).ingest(photos)
    assert found.indexed == 9
    assert [(file.path.name, file.reason) for file in found.skipped] == [
        ("2.png", "there was not enough memory to read it")
    ]
