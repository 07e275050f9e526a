"""Which files a folder, a file or a pattern means, and which root they belong to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrieval import Index, IngestError
from retrieval.sources import Roots, find_files


def names(images, below):
    return [os.path.relpath(path, below) for path in find_files(images).files]


def test_a_folder_is_walked_sorted_and_without_hidden_files(photos):
    (photos / ".hidden.png").touch()
    (photos / ".cache").mkdir()
    (photos / ".cache" / "x.png").touch()
    assert names(photos, photos) == [f"{n}.png" for n in range(7)] + [f"sub/{n}.png" for n in (7, 8, 9)]


def test_patterns_files_and_several_inputs_name_each_file_once(photos):
    several = [str(photos / "[0-2].png"), photos / "1.png", str(photos / "sub"), str(photos / "**" / "9.png")]
    assert names(several, photos) == ["0.png", "1.png", "2.png", "sub/7.png", "sub/8.png", "sub/9.png"]


def test_loops_of_links_end_and_linked_folders_are_followed_once(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").touch()
    (photos / "a-link").symlink_to(elsewhere)
    (photos / "b-link").symlink_to(elsewhere)
    (photos / "aa-sub").symlink_to(photos / "sub")
    (photos / "sub" / "up").symlink_to(photos)
    found = names(photos, photos)
    assert "a-link/x.png" in found
    assert "b-link/x.png" not in found
    assert [name for name in found if name.endswith("7.png")] == ["sub/7.png"]  # its own name, not the link's


def test_an_index_among_the_pictures_is_left_out(photos, elastic):
    before = find_files(photos).files
    Index.create(photos / "my.index", encoder=elastic)
    assert find_files(photos).files == before


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ("empty", "folder empty: holds no pictures; name a folder, a file or a pattern that holds pictures"),
        ("nothing-here", "nothing-here: no such file or folder; name"),
        ("*.jpg", "*.jpg: the pattern matches no files; name"),
        ([], "images: no pictures were given; name"),
    ],
)
def test_nothing_to_index_is_one_sentence(images, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(IngestError) as caught:
        find_files(images)
    assert str(caught.value).startswith(sentence)


def test_a_missing_one_among_several_is_listed_not_fatal(photos):
    found = find_files([photos, photos / "gone.png"])
    assert len(found.files) == 10
    assert [(file.path, file.reason) for file in found.missing] == [(photos / "gone.png", "no such file")]


def test_a_file_belongs_to_the_deepest_root_and_known_roots_are_kept():
    roots = Roots({"trip": "/p/2024/trip"}, ["/p/2024", "/p/2024/other", "/p/2024/trip/day1"])
    assert roots.named == {"trip": "/p/2024/trip", "2024": "/p/2024"}
    assert roots.locate("/p/2024/trip/day1/x.png") == ("trip", b"day1/x.png")
    assert roots.locate("/p/2024/other/x.png") == ("2024", b"other/x.png")
    assert Roots({}, ["/"]).locate("/x.png") == ("root", b"x.png")


def test_roots_of_one_name_are_told_apart():
    assert Roots({}, ["/a/photos", "/b/photos"]).named == {"photos": "/a/photos", "photos-2": "/b/photos"}
