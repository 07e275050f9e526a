"""Ctrl-C, a reader that has enough, a disk that refuses: no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from matvit.progress import silent
from matvit_app import services


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_ctrl_c_ends_with_130_and_says_nothing(run, monkeypatch):
    monkeypatch.setattr(services, "info_of", interrupted)
    done = run("info")
    assert (done.code, done.out, done.err) == (130, "", "")


def test_ctrl_c_while_the_commands_are_loaded_ends_with_130_and_says_nothing():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["matvit"].partition(":")
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
class Finder:
    def find_spec(name, path, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
from {module} import {function}
sys.exit({function}())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_indexing_says_how_to_go_on(run, photos, checkpoint, tmp_path, monkeypatch):
    from retrieval.index import Index

    place = tmp_path / "a.index"
    assert run("index", photos / "cats", "--index", place, "--encoder", checkpoint).code == 0
    monkeypatch.setattr(Index, "ingest", interrupted)
    done = run("index", photos, "--index", place)
    assert (done.code, done.out) == (130, "")
    assert done.err == f"interrupted: {place} holds 4 pictures; run the same again to go on where it stopped\n"


def test_ctrl_c_tells_when_the_bar_no_longer_draws_over_it(run, photos, checkpoint, tmp_path, monkeypatch):
    from matvit_app.cli import index
    from retrieval.ingest import Ingest

    @contextmanager
    def bar():
        try:
            yield silent
        finally:
            sys.stderr.write("bar gone\n")

    monkeypatch.setattr(index, "progress_bar", bar)
    monkeypatch.setattr(Ingest, "run", interrupted)
    done = run("index", photos, "--index", tmp_path / "a.index", "--encoder", checkpoint)
    assert done.err.startswith("bar gone\ninterrupted before any picture")


def test_ctrl_c_before_anything_was_indexed_leaves_no_index(run, photos, checkpoint, tmp_path, monkeypatch):
    from retrieval.ingest import Ingest

    monkeypatch.setattr(Ingest, "run", interrupted)
    done = run("index", photos, "--index", tmp_path / "a.index", "--encoder", checkpoint)
    assert (done.code, done.err.startswith("interrupted before any picture")) == (130, True)
    assert not (tmp_path / "a.index").exists()


def test_a_reader_that_closes_the_pipe_gets_no_traceback(checkpoint):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from matvit_app.cli.main import main; sys.exit(main())"]
    done = subprocess.run([*command, "info", str(checkpoint)], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(run, checkpoint, tmp_path):
    tmp_path.chmod(0o500)
    done = run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "s.safetensors")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_a_disk_that_refuses_is_one_sentence(run, checkpoint, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "s.safetensors")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {tmp_path / 's.json'}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the disk is gone"), "the disk is gone"),
        (OSError(2, "No such file or directory"), "the working folder is gone; change to one that is there"),
        (OSError(28, "No space left on device", "a.json"), "a.json: No space left on device"),
        (MemoryError(), "there is not enough memory; free some, and run the same again"),
        (torch.OutOfMemoryError("CUDA"), "there is not enough memory; free some, and run the same again"),
        (RuntimeError("DefaultCPUAllocator: can't"), "there is not enough memory; free some, and run the same again"),
    ],
)
def test_any_refusal_of_the_system_is_one_sentence(run, monkeypatch, error, sentence):
    def refuse(target):
        raise error

    monkeypatch.setattr(services, "info_of", refuse)
    done = run("info")
    assert (done.code, done.out, done.err) == (2, "", f"error: {sentence}\n")
