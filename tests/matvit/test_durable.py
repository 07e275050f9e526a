"""Durable writes: the old file or the new one, and errors that name the file that was asked for."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from matvit import durable
from matvit.durable import sync_file, sync_folder, write_atomic, write_synced


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [write_atomic, write_synced])
def test_a_write_that_the_system_cuts_short_names_its_file(tmp_path, write):
    path = tmp_path / "large.bin"
    with files_limited_to(1000), pytest.raises(OSError, match="File too large") as caught:
        write(path, b"x" * 1001)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))


def test_a_refused_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "large.bin"
    write_atomic(path, b"old")
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        write_atomic(path, b"x" * 1001)
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("large.bin", b"old")]


@pytest.mark.parametrize("write", [write_atomic, write_synced])
def test_a_folder_in_the_files_place_is_named_not_the_temporary_file(tmp_path, write):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path / "taken", b"new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "taken"), None)


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not synced there")
def test_a_refused_sync_names_its_file_or_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def refuse(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    for sync, path in ((sync_file, tmp_path / "file"), (sync_folder, tmp_path)):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            sync(path)
        assert caught.value.filename == str(path)


def test_files_that_belong_together_stay_as_they_were_when_the_disk_is_full(tmp_path, monkeypatch):
    durable.write_together({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    synced = iter([None, OSError(28, "No space left on device")])

    def full(descriptor):
        if problem := next(synced):
            raise problem

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        durable.write_together({tmp_path / "a": b"2", tmp_path / "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"1"}
