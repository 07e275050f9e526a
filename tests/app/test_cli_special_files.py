"""A pipe in the place of a file of ours is one sentence: whoever opens it waits for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(60)


def into_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.fixture
def own_index(index, tmp_path):
    return shutil.copytree(index, tmp_path / "own.index")


@pytest.mark.parametrize("name", ["CURRENT", "generations/*.json", "segments/*/items.sqlite"])
@pytest.mark.parametrize("command", ["verify", "info", "repair"])
def test_a_pipe_in_an_index(run, own_index, name, command):
    path = max(own_index.glob(name))
    into_pipe(path)
    outcome = run(command, own_index)
    if command != "repair":
        assert outcome.code in (1, 2)
    told = outcome.out + outcome.err
    if "no manifest can be read" in told:  # repair finds no older generation to go back to
        assert (command, outcome.code) == ("repair", 2)
        return
    assert f"{path}: " in told
    assert "regular file" in told or "is not what was published" in told


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_a_pipe_in_a_checkpoint(run, checkpoint, tmp_path, name):
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    (folder / name).touch()
    into_pipe(folder / name)
    outcome = run("extract", folder, "--spec", "S", "--out", tmp_path / "s.safetensors")
    assert (outcome.code, outcome.out) == (2, "")
    assert "not a regular file" in outcome.err
    assert run("verify", folder).code != 0


def test_a_device_is_no_recipe(run, tmp_path):
    outcome = run("train", "/dev/zero", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.startswith("error: /dev/zero: cannot be read (not a regular file)")


def test_a_huge_file_is_not_read(run, own_index):
    os.truncate(own_index / "CURRENT", 3 * 2**30)
    outcome = run("verify", own_index)
    assert outcome.code == 1
    assert "larger than" in outcome.out + outcome.err


@pytest.mark.parametrize("redirected", [">/dev/full 2>&1", ">&- 2>/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_no_verdict(index, redirected):
    script = "import sys; from matvit_app.cli.main import main; sys.exit(main())"
    line = f'exec "{sys.executable}" -c "{script}" info "{index}" --json {redirected}'
    outcome = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=50, check=False)
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr


def test_a_pipe_in_the_place_of_an_extracted_submodels_json(run, checkpoint, tmp_path):
    os.mkfifo(tmp_path / "small.json")
    done = run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "small.safetensors")
    assert done.code == 2
    assert "small.json: is there already, and is no extracted submodel" in done.err
