"""Folders are walked once each, whatever links there are, and nothing is left out in silence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from matvit.walk import walk_files


def _below(root: Path, *files: str) -> list[str]:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [str(root / name) for name in sorted(files)]


def _raise(error: OSError) -> None:
    raise error


def test_files_of_all_folders_are_listed_in_sorted_order(tmp_path: Path) -> None:
    expected = _below(tmp_path, "b/2", "a", "b/c/d/3", "b/1")
    _below(tmp_path, ".hidden", ".cache/file")
    (tmp_path / "empty").mkdir()
    assert walk_files(tmp_path, on_error=_raise) == walk_files(str(tmp_path), on_error=_raise) == expected


def test_links_that_loop_do_not_multiply_files(tmp_path: Path) -> None:
    expected = _below(tmp_path, "a/1", "a/b/2")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "here").symlink_to(".")
    (tmp_path / "0-link-before-a").symlink_to("a")
    assert walk_files(tmp_path, on_error=_raise) == expected  # by their own names, not the link's


def test_a_linked_folder_elsewhere_is_walked_once(tmp_path: Path) -> None:
    _below(tmp_path, "elsewhere/1")
    (tmp_path / "root").mkdir()
    for name in ("x", "y"):
        (tmp_path / "root" / name).symlink_to("../elsewhere")
    assert walk_files(tmp_path / "root", on_error=_raise) == [str(tmp_path / "root" / "x" / "1")]


def test_links_to_nothing_and_to_themselves_are_listed(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    assert walk_files(tmp_path, on_error=_raise) == [str(tmp_path / "gone"), str(tmp_path / "self")]


def test_pipes_and_sockets_are_listed_and_left_to_whoever_opens_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))  # a socket's path has at most some hundred characters
    assert walk_files(tmp_path, on_error=_raise) == [str(tmp_path / "pipe.png"), str(tmp_path / "socket.png")]


def test_folders_can_be_left_out(tmp_path: Path) -> None:
    kept, _ = _below(tmp_path, "a/1", "b/2")
    assert walk_files(tmp_path, on_error=_raise, leave_out=lambda folder: Path(folder).name == "b") == [kept]


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, last = _below(tmp_path, "a/1", "b/2", "c/3")
    scandir = os.scandir

    def forbid_b(folder: str) -> object:
        return scandir(folder if Path(folder).name != "b" else f"{folder}/2")  # NotADirectoryError

    monkeypatch.setattr(os, "scandir", forbid_b)
    errors: list[OSError] = []
    assert walk_files(tmp_path, on_error=errors.append) == [first, last]
    assert [error.filename for error in errors] == [str(tmp_path / "b" / "2")]
