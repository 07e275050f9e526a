"""The demo photographs: complete, credited, small, and honest about which classes training saw."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

import matvit_data
from matvit.datasets import data_folder, read_dataset
from matvit.errors import DatasetError
from matvit_data import demo_folder, demo_photos

# Tiny-ImageNet's classes that training leaves out, for a demo class shows the same thing.
NOT_TRAINED_ON = {
    *("n07873807", "n01770393", "n01768244", "n04507155", "n01983481", "n01984695", "n03637318", "n04328186"),
    *("n04099969", "n07720875", "n07734744", "n07747607", "n07749582", "n07753592", "n07768694"),
}


def words(name: str) -> str:
    """Words between single spaces, so that `in` compares whole words."""
    return f" {name.lower().replace('-', ' ').replace('_', ' ').strip()} "


def test_every_photograph_opens_is_what_was_listed_and_is_credited():
    for photo in demo_photos():
        content = photo.file.read_bytes()
        assert hashlib.sha256(content).hexdigest() == photo.sha256
        with Image.open(photo.file) as image:
            image.load()
            assert (image.format, min(image.size) <= 160) == ("WEBP", True)
        assert photo.licence in {"MIT", "CC-BY-4.0", "CC0-1.0"}
        assert photo.credit
        assert photo.caption.endswith(".")
        assert Path(photo.path).parts[:3] == ("images", photo.data_set, photo.class_name)


def test_the_folder_holds_the_listed_pictures_and_no_others():
    found = {path.relative_to(demo_folder()).as_posix() for path in (demo_folder() / "images").rglob("*.*")}
    assert found == {photo.path for photo in demo_photos()}


def test_the_demo_stays_small():
    assert sum(path.stat().st_size for path in demo_folder().rglob("*") if path.is_file()) < 5_000_000


def test_licences_file_credits_every_data_set_shown():
    text = " ".join((demo_folder() / "LICENCES.md").read_text(encoding="utf-8").replace("*", "").split())
    for photo in demo_photos():
        authors, _, title = photo.credit.partition(": ")
        assert f"images/{photo.data_set}" in text
        assert authors.split(", ")[0].split(" and ")[0] in text
        assert title.split(",")[0] in text


def test_every_counted_class_has_pictures_that_can_find_each_other():
    classes: dict[tuple[str, str], list[str]] = {}
    for photo in demo_photos():
        classes.setdefault((photo.data_set, photo.class_name), []).append(photo.role)
    assert len(classes) == 81 + 51 + 10
    assert all(roles.count("photo") >= 3 for roles in classes.values())
    assert {roles.count("iconic") for (data_set, _), roles in classes.items() if data_set == "grocery-store"} == {1}


def test_training_saw_no_class_that_the_demo_counts():
    try:
        data = data_folder()
    except DatasetError as error:
        pytest.skip(str(error))
    counted = {(photo.data_set, words(photo.class_name)) for photo in demo_photos() if photo.counted}
    names = {name for _, name in counted}
    first_half = {words(name) for name in read_dataset(data / "caltech-101/test", classes="0:50").class_names}
    assert len(first_half) == 50
    assert not first_half & {name for data_set, name in counted if data_set == "caltech-101"}
    assert not {words(name) for name in read_dataset(data / "clothing-small/test").class_names} & names
    tiny = read_dataset(data / "tiny-imagenet/val").class_names
    trained = {
        words(synonym)
        for name in tiny
        if name.split(" ")[0] not in NOT_TRAINED_ON
        for synonym in name.partition(" ")[2].split(",")
    }
    assert len(trained) > 185
    # Another animal of the same name: Tiny-ImageNet's panda is the red one, Caltech's the giant one.
    assert {synonym for name in names for synonym in trained if synonym in name} == {" panda "}


def test_a_damaged_list_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "demo.json").write_text('{"format_version": 2, "photos": []}')
    monkeypatch.setattr(matvit_data, "demo_folder", lambda: tmp_path)
    with pytest.raises(DatasetError, match=r"demo\.json: .*missing or damaged; install the package again"):
        demo_photos()
