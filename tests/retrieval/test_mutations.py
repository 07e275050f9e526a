"""Damaged, careless and malicious pictures: each is indexed or skipped with a reason, soon, in bounded memory.

`make soak` tries more of them: MATVIT_SOAK_IMAGES.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest

from matvit.preprocess import MAX_PIXELS
from matvit.threads import usable_cores
from retrieval import Index
from retrieval.loading import MEMORY_BYTES

HELPERS = runpy.run_path(str(Path(__file__).with_name("mutations.py")))
IMAGES = int(os.environ.get("MATVIT_SOAK_IMAGES", "400"))
SHARD = int(os.environ.get("MATVIT_SOAK_SHARD", "0"))
CHUNK = min(1000, -(-IMAGES // 2))  # pictures on the disk at a time
SECONDS = 15.0  # of a processor, for one picture; none of these is as large as docs/decisions/0010 allows
# glibc keeps freed memory for later in an arena of each thread; malloc_trim gives little of it back. With 16 threads
# and 8,333 pictures, 494 to 727 MiB stayed resident, of 172 to 190 after the first 1,000, but what malloc had given out
# grew by 1.7 MiB; the peak was 1.5 to 2.9 GiB. So that must not grow, and the peak has a share for each thread.
LARGEST = 21 * MAX_PIXELS  # bytes: an AVIF as large as Pillow allows, which is decoded alone (decision 0010)
PEAK = max(MEMORY_BYTES, LARGEST) // 2**20 + 512 + 128 * usable_cores()  # MiB
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
STATUS = Path("/proc/self/status")


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="memory is measured with glibc 2.33")
def test_every_mutated_picture_is_indexed_or_skipped_with_a_reason(tmp_path, elastic, monkeypatch):
    slowest = _watch(monkeypatch, type(elastic.encoder()))
    first = SHARD * IMAGES
    settled = 0
    for start in range(first, first + IMAGES, CHUNK):
        folder = tmp_path / f"from-{start}"
        _write(folder, range(start, min(start + CHUNK, first + IMAGES)))
        faulthandler.dump_traceback_later(600, exit=True)  # a hang ends here, and says where
        _check(folder, tmp_path / "i", elastic)
        faulthandler.cancel_dump_traceback_later()
        settled = settled or _in_use()
    assert slowest[0] < SECONDS, slowest
    grown = _in_use() - settled
    assert _peak() < PEAK
    assert grown < 16
    print(f"\nsoak slowest picture, s: {slowest[0]:.2f}\nsoak peak of memory, MiB: {_peak()}")
    print(f"soak growth of memory in use, MiB: {max(0.0, grown):.1f}")


def _write(folder, seeds):
    folder.mkdir()
    for seed in seeds:
        name, data = HELPERS["mutated"](seed)
        (folder / name).write_bytes(data)


def _check(folder, path, elastic):
    given = len(list(folder.iterdir()))
    index = Index.create(path, encoder=elastic)
    first = index.ingest(folder)
    info = index.info()
    assert (first.indexed, first.indexed + len(first.skipped)) == (info.items, given)
    assert len({file.path for file in first.skipped}) == len(first.skipped)
    assert {file.path for file in info.skipped} == {file.path for file in first.skipped}
    for file in first.skipped:
        assert re.fullmatch(r"\S.{3,199}", file.reason), file
        assert file.reason.isprintable(), file
    assert index.verify() == []
    again = index.ingest(folder)
    assert (again.indexed, again.unchanged, again.skipped) == (0, info.items, first.skipped)
    shutil.rmtree(folder)
    shutil.rmtree(path)


def _watch(monkeypatch, encoder):
    """The most processor time that one picture took."""
    slowest, real = [0.0], encoder.preprocess

    def preprocess(self, images):
        start = time.thread_time()
        try:
            return real(self, images)
        finally:
            slowest[0] = max(slowest[0], time.thread_time() - start)

    monkeypatch.setattr(encoder, "preprocess", preprocess)
    return slowest


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2`, bytes."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",  # in use, in mappings of their own
            "usmblks",
            "fsmblks",
            "uordblks",  # in use, in arenas
            "fordblks",
            "keepcost",
        )
    )


def _in_use():
    """MiB that malloc has given out and not got back, and small Python objects, each as the largest (512 bytes)."""
    gc.collect()
    LIBC.mallinfo2.restype = _MallocInfo
    found = LIBC.mallinfo2()
    return (found.uordblks + found.hblkhd + 512 * sys.getallocatedblocks()) / 2**20


def _peak():
    """MiB resident, at most, since the process began."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) // 1024
