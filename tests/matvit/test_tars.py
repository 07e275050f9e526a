"""Tar shards in webdataset's layout are labelled data sets like any other."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from matvit.datasets import read_dataset
from matvit.errors import DatasetError, ImageError
from matvit.preprocess import open_image


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 10, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


LABELLED = {
    "cls": {"a.cls": b"7\n", "a.png": picture(0), "b.png": picture(1), "b.cls": b"fox", "b.txt": b"a fox"},
    "json": {
        "a.png": picture(0),
        "a.json": json.dumps({"label": 7, "width": 6}).encode(),
        "./b.png": picture(1),
        "./b.json": b'{"label": "fox"}',
    },
    "folders": {"7/a.png": picture(0), "fox/b.PNG": picture(1), "fox/b.txt": b"a fox"},
}


@pytest.mark.parametrize("form", LABELLED)
def test_the_class_is_the_samples_cls_its_json_or_the_members_folder(tmp_path: Path, form: str) -> None:
    found = read_dataset(write_tar(tmp_path / "birds.tar", LABELLED[form]))
    assert found.class_names == ("7", "fox")
    assert list(found.images) == [picture(0), picture(1)]
    assert list(found.labels) == [0, 1]
    assert found.origins[0].startswith(f"{tmp_path / 'birds.tar'}#")


def test_classes_that_are_one_number_in_other_digits_stay_apart(tmp_path: Path) -> None:
    names = ("007", "7", "\u0663", "3")
    members = {f"{i}.cls": name.encode() for i, name in enumerate(names)}
    pictures = {f"{i}.png": picture(i) for i in range(len(names))}
    found = read_dataset(write_tar(tmp_path / "birds.tar", dict(sorted((members | pictures).items()))))
    assert sorted(found.class_names) == sorted(names)


def test_hidden_members_and_folders_are_left_out_as_they_are_on_disk(tmp_path: Path) -> None:
    hidden = {"fox/._a.png": b"of macOS", ".thumbs/fox/a.png": picture(2), "./.b.png": picture(3)}
    found = read_dataset(write_tar(tmp_path / "birds.tar", LABELLED["folders"] | hidden))
    assert list(found.images) == [picture(0), picture(1)]


def test_shards_of_a_split_are_one_data_set_like_the_same_pictures_in_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "train-000000.tar", {"a.png": picture(0), "a.cls": b"one"})
    write_tar(tmp_path / "set" / "train-000001.tar", {"b.png": picture(1), "b.cls": b"two"})
    write_tar(tmp_path / "set" / "val-000000.tar", {"c.png": picture(2), "c.cls": b"one"})
    for name, shade in (("one", 0), ("two", 1)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "x.png").write_bytes(picture(shade))
    shards, tree = read_dataset(tmp_path / "set" / "train"), read_dataset(tmp_path / "tree")
    assert shards.sha256 == tree.sha256
    assert len(read_dataset(tmp_path / "set" / "train-*.tar", classes="0:1")) == 1
    with pytest.raises(DatasetError, match="holds the splits train, val; name one"):
        read_dataset(tmp_path / "set")


def test_an_archive_beside_class_folders_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "x.png").write_bytes(picture(0))
    write_tar(tmp_path / "dogs.tar", LABELLED["cls"])
    assert read_dataset(tmp_path).class_names == ("dog",)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"a.png": b"x"}, r"birds\.tar: a\.png in it has no class; put a \.cls beside it"),
        ({"a.png": b"x", "a.json": b"{}"}, r"a\.png in it has no class"),
        ({"a.png": b"x", "a.json": b'{"label": null}'}, r"a\.png in it has no class"),
        ({"a.png": b"x", "a.json": b"{"}, r"a\.json in it cannot be read; write the shard again"),
        ({"a.png": b"x", "a.cls": b"\xff"}, r"a\.cls in it cannot be read"),
        ({"a.txt": b"x"}, "holds no pictures; give tar shards in webdataset's layout"),
    ],
)
def test_what_is_no_labelled_shard_is_one_sentence(tmp_path: Path, members: Mapping[str, bytes], sentence: str) -> None:
    with pytest.raises(DatasetError, match=sentence):
        read_dataset(write_tar(tmp_path / "birds.tar", members))


def test_a_damaged_shard_is_refused_and_a_picture_that_is_gone_later_is_unreadable(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "birds.tar", LABELLED["cls"])
    found = read_dataset(whole)
    content = bytearray(whole.read_bytes())
    content[512 * 2] ^= 255  # in the second header
    whole.write_bytes(content)
    with pytest.raises(DatasetError, match=r"birds\.tar: damaged tar shard"):
        read_dataset(whole)
    whole.unlink()
    assert found.images[0] == b""


def test_a_shard_that_is_cut_between_members_is_damaged(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "birds.tar", LABELLED["folders"])
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    with whole.open("r+b") as file:
        file.truncate(last.offset)
    with pytest.raises(DatasetError, match=r"birds\.tar: damaged tar shard \(at byte"):
        read_dataset(whole)


def test_a_member_of_a_negative_size_is_damage(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "birds.tar", {"fox/a.png": picture(0)})
    content = bytearray(shard.read_bytes())
    content[124:136] = b"\xff" * 11 + b"\x00"  # -256, in base 256
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"birds\.tar: damaged tar shard \((negative size|invalid offset)\)"):
        read_dataset(shard)


def _write_sparse(path: Path, name: str, size: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    with path.open("wb") as file:
        file.write(entry.tobuf())
        file.truncate(512 + size)
    with path.open("ab") as file:
        for name, content in {"fox/a.png": picture(0), "fox/z.png": picture(1)}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.write(entry.tobuf() + content.ljust(512, b"\0"))
        file.write(bytes(1024))


def test_links_and_sparse_members_are_unreadable_pictures_with_their_reason(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "birds.tar", {"fox/a.png": picture(0)})
    kinds = {
        "hard": tarfile.LNKTYPE,
        "soft": tarfile.SYMTYPE,
        "holes": tarfile.GNUTYPE_SPARSE,
        "pipe": tarfile.FIFOTYPE,
    }
    with tarfile.open(shard, "a") as tar:
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(f"fox/{name}.png")
            entry.type, entry.linkname = kind, "fox/a.png"
            tar.addfile(entry)
    found = read_dataset(shard)
    assert len(found) == 5
    reasons = []
    for image in found.images[1:]:
        with pytest.raises(ImageError) as caught:
            open_image(image)
        reasons.append(caught.value.what)
    link = "a link in the shard is not followed; write it with: tar --dereference --hard-dereference"
    assert reasons == [link, link, *["is no plain file in the shard; write it with tar, without --sparse"] * 2]


def test_a_class_that_is_a_link_in_a_shard_is_told(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "birds.tar", {"fox/a.png": picture(0)})
    with tarfile.open(shard, "a") as tar:
        entry = tarfile.TarInfo("fox/a.cls")
        entry.type, entry.linkname = tarfile.LNKTYPE, "b.cls"
        tar.addfile(entry)
    with pytest.raises(DatasetError, match=r"fox/a\.cls in it cannot be read"):
        read_dataset(shard)


def test_members_larger_than_any_are_not_read(tmp_path: Path) -> None:
    _write_sparse(tmp_path / "said.tar", "fox/a.json", 3 * 2**30)
    with pytest.raises(DatasetError, match=r"fox/a\.json in it has 3221225472 bytes"):
        read_dataset(tmp_path / "said.tar")
    _write_sparse(tmp_path / "shown.tar", "fox/0.jpg", 3 * 2**30)
    assert [len(one) for one in read_dataset(tmp_path / "shown.tar").images] == [0, len(picture(0)), len(picture(1))]
