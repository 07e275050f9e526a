"""Which files a folder, a file or a pattern means, and which root they belong to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from retrieval import Index, IngestError
from retrieval.roots import Roots
from retrieval.sources import find_files


def paths(images):
    return [file.path for file in find_files(images).files()]


def names(images, below):
    return [os.path.relpath(path, below) for path in paths(images)]


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
    before = paths(photos)
    Index.create(photos / "my.index", encoder=elastic)
    assert paths(photos) == before


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


@pytest.mark.parametrize("images", ["empty", "nothing-here"])
def test_where_all_that_is_named_is_gone_delete_forgets_nothing_and_says_how(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(IngestError, match=r"a disk may be away: if it is not, matvit delete PATH --index INDEX"):
        find_files(images, delete=True)


@pytest.mark.parametrize("images", ["", [""]])
def test_an_empty_name_is_not_the_working_directory(images, photos, monkeypatch):
    monkeypatch.chdir(photos)
    with pytest.raises(IngestError, match="an empty name"):
        find_files(images)


@pytest.mark.parametrize("pattern", ["**", "**/*.png", "*", "[s]*"])
def test_a_pattern_names_each_file_once_whatever_links_lead_to_it(photos, pattern):
    (photos / "again").symlink_to(photos / "sub")
    (photos / "sub" / "up").symlink_to(photos)
    found = names(str(photos / pattern), photos)
    assert sorted(Path(name).name for name in found) == [f"{n}.png" for n in range(10)]
    if pattern.startswith("**"):
        assert {name for name in found if "/" in name} == {"sub/7.png", "sub/8.png", "sub/9.png"}


@pytest.fixture
def unreadable(monkeypatch):
    """unreadable(folder) -> it cannot be listed, nor what is in it be looked at; not even by root."""

    def refuse(folder):
        for name in ("scandir", "lstat", "stat"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name), folder))

    def refusing(real, folder):
        def call(path=".", *arguments, **named):
            place = Path("." if isinstance(path, int) else os.fsdecode(path))
            if folder in place.parents or (folder == place and real is scandir):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return real(path, *arguments, **named)

        return call

    scandir = os.scandir
    return refuse


def test_a_folder_that_cannot_be_read_is_listed_and_the_others_are_walked(photos, unreadable):
    unreadable(photos / "sub")
    found = find_files([photos, str(photos / "**")])
    assert len(found) == 7
    assert [(file.path, file.reason) for file in found.skipped] == [
        (photos / "sub", "folder cannot be read (Permission denied)")
    ]


def test_what_cannot_be_looked_at_is_not_called_missing(photos, unreadable):
    unreadable(photos / "sub")
    found = find_files([photos / "1.png", photos / "sub" / "7.png"])
    assert found.missing == []
    assert [(file.path.name, file.reason) for file in found.skipped] == [("7.png", "may not be read")]
    with pytest.raises(IngestError, match=r"sub: folder cannot be read \(Permission denied\); check"):
        find_files(photos / "sub")


def test_a_link_to_itself_does_not_stop_a_walk(photos):
    (photos / "loop").symlink_to(photos / "loop")
    (photos / "loop.png").symlink_to(photos / "loop.png")
    assert len(names(photos, photos)) == 11  # loop.png is listed, and then skipped with its reason


def test_delete_keeps_what_merely_cannot_be_read(photos, elastic, tmp_path, unreadable):
    index = Index.build(photos, encoder=elastic, path=tmp_path / "i")
    (photos / "1.png").unlink()
    unreadable(photos / "sub")
    report = index.ingest(photos, delete=True)
    assert (report.deleted, index.info().items) == (1, 9)
    assert [file.path for file in report.skipped] == [photos / "sub"]
    assert index.ingest([photos / "0.png", photos / "sub"], delete=True).deleted == 0


def test_a_missing_one_among_several_is_listed_not_fatal(photos):
    found = find_files([photos, photos / "gone.png"])
    assert len(found) == 10
    assert [(file.path, file.reason) for file in found.missing] == [(photos / "gone.png", "no such file")]


def test_a_file_belongs_to_the_deepest_root_and_known_roots_are_kept():
    roots = Roots({"trip": "/p/2024/trip"}, dict.fromkeys(["/p/2024", "/p/2024/other", "/p/2024/trip/day1"], False))
    assert roots.named == {"trip": "/p/2024/trip", "2024": "/p/2024"}
    assert roots.locate("/p/2024/trip/day1/x.png") == ("trip", b"day1/x.png")
    assert roots.locate("/p/2024/other/x.png") == ("2024", b"other/x.png")
    assert Roots({}, {"/": True}).locate("/x.png") == ("root", b"x.png")


def test_folders_of_one_name_have_a_root_each():
    roots = Roots({"a": "/k", "a-3": "/l"}, {f"/p/{number}/a": True for number in range(2000)})
    assert sorted(roots.named) == sorted(["a", *(f"a-{number}" for number in range(2, 2002)), "a-2002"])


def test_of_many_folders_that_only_a_list_names_those_around_them_are_roots():
    shop = {f"/nas/shop/{number % 30}/{number}": False for number in range(3000)}
    urls = {f"https://host/{number // 50}/{number}": False for number in range(200)}
    roots = Roots({}, {**shop, **urls, "/nas/shop/7/7": True})
    around = {*(f"/nas/shop/{number}" for number in range(30)), *(f"https://host/{number}" for number in range(4))}
    assert set(roots.named.values()) == around | {"/nas/shop/7/7"}
    assert roots.locate("/nas/shop/9/39/x.png") == ("9", b"39/x.png")
    hosts = {f"https://host-{number}/a": False for number in range(200)}
    assert set(Roots({}, hosts).named.values()) == {f"https://host-{number}" for number in range(200)}


def test_every_new_folder_is_a_root_and_that_of_a_named_file_only_where_no_other_contains_it():
    bases = {"/p": False, "/p/photos": True, "/p/photos/ferry": False, "/p/shop": True, "/p/shop/new": True}
    assert list(Roots({}, bases).named.values()) == ["/p/shop", "/p/photos", "/p/shop/new", "/p"]
    assert Roots({"p": "/p"}, bases).named == {"p": "/p"}  # what is known of the files below keeps its place


def test_roots_of_one_name_are_told_apart():
    assert Roots({}, {"/a/photos": True, "/b/photos": True}).named == {"photos": "/a/photos", "photos-2": "/b/photos"}


@pytest.mark.parametrize("images", [None, 5, b"a.png", [None], [b"a.png"], [[]]])
def test_what_is_no_path_names_no_pictures(images):
    with pytest.raises(IngestError, match="names no pictures; give a path, a pattern or a URL"):
        find_files(images)
