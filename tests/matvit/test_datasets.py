"""Data sets are read alike from folders and parquet, and refused in one sentence."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matvit.datasets import data_folder, portable, read_dataset
from matvit.errors import DatasetError, MissingExtraError

NAMES = ["Fruit/apple", "Fruit/pear", "n01 cat, tabby", "n02 dog"]
BOTH_SORTS_OF_LABEL = pytest.mark.parametrize("labels", [[2, 0, 2], ["b", "a", "b"]], ids=["numbers", "texts"])


def encoded(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 10, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, labels: Sequence[Any], *, names: Sequence[str] | None = NAMES, first: int = 0) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow writes the test's parquet files")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(first + row), "path": f"{row}.png"} for row in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)
    return path


def write_tree(root: Path, labels: Sequence[int]) -> Path:
    for row, label in enumerate(labels):
        path = root / NAMES[label] / f"{row:03}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(row))
    return root


def test_a_tree_gives_one_class_per_folder_path(tmp_path: Path) -> None:
    root = write_tree(tmp_path, [1, 3, 0, 1])
    (root / "Fruit" / "apple" / "notes.txt").write_text("no picture")
    (root / ".cache").mkdir()
    (root / ".cache" / "hidden.png").write_bytes(encoded(9))
    data = read_dataset(root)
    assert data.class_names == ("Fruit/apple", "Fruit/pear", "n02 dog")
    assert [str(path) for path in data.images] == list(data.origins)
    assert [
        (Path(origin).name, data.class_names[label]) for origin, label in zip(data.origins, data.labels, strict=True)
    ] == [
        ("002.PNG", "Fruit/apple"),
        ("000.PNG", "Fruit/pear"),
        ("003.PNG", "Fruit/pear"),
        ("001.PNG", "n02 dog"),
    ]


def test_a_link_that_loops_does_not_multiply_the_pictures_of_a_tree(tmp_path: Path) -> None:
    root = write_tree(tmp_path, [0, 1])
    (root / "Fruit" / "apple" / "again").symlink_to(root / "Fruit")
    assert read_dataset(root).class_names == ("Fruit/apple", "Fruit/pear")
    assert len(read_dataset(root)) == 2


def test_a_class_folder_that_cannot_be_read_is_refused_rather_than_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, [0, 3])
    scandir = os.scandir

    def deny(folder: str | Path) -> object:
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DatasetError, match=r"n02 dog: folder cannot be read \(Permission denied\)"):
        read_dataset(tmp_path)


def test_a_location_that_cannot_be_looked_up_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"cannot be looked up \(File name too long\); check the path"):
        read_dataset("x" * 5000)

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(DatasetError, match=r"locked/data: cannot be looked up \(Permission denied\)"):
        read_dataset("locked/data")


def test_every_usual_suffix_of_a_picture_is_taken(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    for name in ("a.jpg", "b.JPEG", "c.jfif", "d.jpe", "e.mpo", "f.png"):
        (tmp_path / "dog" / name).write_bytes(encoded(0))
    assert len(read_dataset(tmp_path)) == 6


def test_parquet_gives_encoded_bytes_and_the_schemas_class_names(tmp_path: Path) -> None:
    data = read_dataset(write_parquet(tmp_path / "food.parquet", [3, 0, 3]))
    assert len(data) == 3
    assert data.class_names == tuple(NAMES)  # also those without a picture, so that indices stay the same
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [3, 0, 3]
    assert list(data.images) == [encoded(0), encoded(1), encoded(2)]
    assert data.origins[2] == f"{tmp_path / 'food.parquet'} row 2"
    assert list(data.images[1:]) == [encoded(1), encoded(2)]


def test_labels_index_sorted_names_however_the_schema_orders_them(tmp_path: Path) -> None:
    data = read_dataset(write_parquet(tmp_path / "a.parquet", [0, 1, 2], names=["pear", "Zebra", "apple"]))
    assert data.class_names == ("Zebra", "apple", "pear")
    assert [data.class_names[label] for label in data.labels] == ["pear", "Zebra", "apple"]


@BOTH_SORTS_OF_LABEL
def test_without_names_the_labels_themselves_name_the_classes(tmp_path: Path, labels: list[Any]) -> None:
    data = read_dataset(write_parquet(tmp_path / "a.parquet", labels, names=None))
    assert [data.class_names[label] for label in data.labels] == [str(label) for label in labels]


def test_a_split_is_named_as_folder_glob_or_shorthand_and_read_in_shard_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train-00001-of-00002.parquet", [1], first=7)
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", [2, 0])
    alone = read_dataset(tmp_path / "set")
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", [3])
    for location in (tmp_path / "set" / "train", tmp_path / "set" / "train-*.parquet", tmp_path / "s*t" / "train*"):
        data = read_dataset(location)
        assert list(data.images) == [encoded(0), encoded(1), encoded(7)]
        assert data.labels.tolist() == [2, 0, 1]
        assert data.sha256 == alone.sha256
    assert len(read_dataset(tmp_path / "set" / "test")) == 1


@pytest.mark.parametrize("location", ["", "*.parquet"])
def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path, location: str) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [0])
    with pytest.raises(
        DatasetError, match=f"holds the splits train, validation; name one, for example {tmp_path}/train"
    ):
        read_dataset(tmp_path / location)


@pytest.mark.parametrize("shards", [("train-0", "train-1"), ("train_0", "train_10"), ("train.0", "train.1")])
def test_numbered_shards_are_one_split(tmp_path: Path, shards: Sequence[str]) -> None:
    for shard in shards:
        write_parquet(tmp_path / f"{shard}.parquet", [0])
    assert len(read_dataset(tmp_path)) == len(read_dataset(tmp_path / "train")) == 2


def test_shards_may_have_no_name_but_a_number(tmp_path: Path) -> None:
    for shard in ("0000", "0001"):
        write_parquet(tmp_path / f"{shard}.parquet", [0])
    assert len(read_dataset(tmp_path)) == 2


def test_names_that_end_in_a_number_are_splits_of_their_own(tmp_path: Path) -> None:
    for shard in ("cifar10-00000-of-00001", "cifar100-00000-of-00001", "fold1", "fold2"):
        write_parquet(tmp_path / f"{shard}.parquet", [0])
    for split in ("cifar10", "cifar100", "fold1", "fold2"):
        assert len(read_dataset(tmp_path / split)) == 1
    with pytest.raises(DatasetError, match="holds the splits cifar10, cifar100, fold1, fold2"):
        read_dataset(tmp_path)


def test_a_split_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00003.parquet", [0])
    write_parquet(tmp_path / "train-00002-of-00003.parquet", [0])
    with pytest.raises(DatasetError, match="2 of 3 shards are there"):
        read_dataset(tmp_path / "train")


@pytest.mark.parametrize(("classes", "kept"), [("1:3", [1, 2]), ("2:", [2, 3]), (":1", [0]), ("3, 1", [1, 3])])
def test_classes_are_chosen_by_index_of_the_sorted_names(tmp_path: Path, classes: str, kept: list[int]) -> None:
    data = read_dataset(write_parquet(tmp_path / "a.parquet", [3, 0, 1, 2, 3]), classes=classes)
    assert data.class_names == tuple(NAMES[index] for index in kept)
    assert {data.class_names[label] for label in data.labels} == set(data.class_names)
    assert data.name == f"{tmp_path / 'a.parquet'} [{classes}]"


@pytest.mark.parametrize(
    "classes",
    ["", "4", "2:5", "3:3", "9:", "a", "1-2", "-1", "0:4:2", "1,,2", "1" * 5000, "0:" + "9" * 5000, "0:999999999"],
)
def test_classes_that_select_nothing_or_too_much_are_refused(tmp_path: Path, classes: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3])
    with pytest.raises(DatasetError, match=r"give a slice such as 0:4 or a list such as 0,3"):
        read_dataset(path, classes=classes)


def test_classes_are_excluded_by_name_or_first_word_and_indices_count_before(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3])
    data = read_dataset(path, exclude=["n01", "Fruit/apple"])
    assert data.class_names == ("Fruit/pear", "n02 dog")
    assert list(data.images) == [encoded(1), encoded(3)]
    assert read_dataset(path, classes="1:3", exclude=["n01"]).class_names == ("Fruit/pear",)


def test_a_misspelt_exclusion_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3])
    for unknown in ("n0", "Fruit", "dog"):
        with pytest.raises(DatasetError, match=f"has no class '{unknown}'"):
            read_dataset(path, exclude=[unknown])
    with pytest.raises(DatasetError, match="no class is left"):
        read_dataset(path, classes="2", exclude=["n01"])


def test_the_fingerprint_is_of_content_not_of_location(tmp_path: Path) -> None:
    labels = [0, 1, 1, 2]
    tree = read_dataset(write_tree(tmp_path / "tree", labels))
    moved = read_dataset((tmp_path / "tree").rename(tmp_path / "moved"))
    shard = read_dataset(write_parquet(tmp_path / "a.parquet", labels, names=NAMES[:3]))
    assert moved.sha256 == shard.sha256  # the tree's order is the shard's here
    with pytest.raises(DatasetError, match=r"cannot be read \(No such file or directory\); restore the file"):
        _ = tree.sha256


def test_the_fingerprint_changes_with_pictures_labels_and_names(tmp_path: Path) -> None:
    variants = [
        write_parquet(tmp_path / "base.parquet", [0, 1]),
        write_parquet(tmp_path / "pictures.parquet", [0, 1], first=1),
        write_parquet(tmp_path / "labels.parquet", [1, 0]),
        write_parquet(tmp_path / "names.parquet", [0, 1], names=["a", "b"]),
    ]
    assert len({read_dataset(path).sha256 for path in variants}) == len(variants)


def test_a_missing_picture_in_parquet_reads_as_no_bytes(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = pa.array([{"bytes": None, "path": "a"}, None, {"bytes": b"x", "path": None}])
    parquet.write_table(pa.table({"image": images, "label": [0, 0, 0]}), tmp_path / "a.parquet")
    assert list(read_dataset(tmp_path / "a.parquet").images) == [b"", b"", b"x"]


def test_locations_without_labelled_pictures_are_refused_in_one_sentence(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = [{"bytes": b"x", "path": "x"}]
    for name, columns in {
        "unlabelled": {"image": image},
        "imageless": {"picture": image, "label": [0]},
        "paths": {"image": ["x.jpg"], "label": [0]},
        "floats": {"image": image, "label": [0.5]},
        "nulls": {"image": image, "label": pa.array([None], pa.int64())},
        "nothing": {"image": pa.array([], pa.struct({"bytes": pa.binary()})), "label": pa.array([], pa.int64())},
    }.items():
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    (tmp_path / "list.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path / "stray", [0])
    (tmp_path / "stray" / "loose.jpg").write_bytes(b"")
    refused = {
        "unlabelled.parquet": "has no column 'label'",
        "imageless.parquet": "has no column 'image' with bytes",
        "paths.parquet": "has no column 'image' with bytes",
        "floats.parquet": "has rows whose label is no number and no text",
        "nulls.parquet": "has rows whose label is no number and no text",
        "nothing.parquet": "holds no rows",
        "junk.parquet": "is no readable parquet file",
        "list.csv": "is a file, but no parquet and no tar file",
        "empty": "holds no pictures, parquet files or tar shards",
        "stray": "1 pictures, such as loose.jpg, are in no class folder",
        "missing": "no such data set",
        "missing/train-*.parquet": "no such data set",
    }
    for location, reason in refused.items():
        with pytest.raises(DatasetError) as caught:
            read_dataset(tmp_path / location)
        assert str(caught.value).startswith(f"{tmp_path / location}: {reason}; ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_named_classes_are_refused(tmp_path: Path, label: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, label])
    with pytest.raises(DatasetError, match=f"1 rows have a label, such as {label}, outside the 4 named classes"):
        read_dataset(path)


def test_two_classes_of_one_name_are_not_taken_for_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1], names=["fox", "fox"])
    with pytest.raises(DatasetError, match="two of its classes have the name 'fox'; give each a name of its own"):
        read_dataset(path)


def test_without_pyarrow_parquet_names_the_extra_and_trees_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(tmp_path / "tree", [0])
    shard = write_parquet(tmp_path / "a.parquet", [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "matvit-retrieval\[parquet\]"'):
        read_dataset(shard)
    assert len(read_dataset(tree)) == 1


def test_a_portable_location_tells_nothing_of_the_machines_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path))
    assert portable(str(tmp_path / "caltech-101" / "test")) == "caltech-101/test"
    assert portable("/home/someone/birds") == "birds"
    assert portable("mine/birds") == "mine/birds"
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path / "gone"))
    assert portable(str(tmp_path / "caltech-101" / "test")) == "test"


def test_the_data_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path / "gone"))
    with pytest.raises(DatasetError, match="set the environment variable MATVIT_DATA"):
        data_folder()


def test_the_data_folder_of_an_installed_package_asks_for_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MATVIT_DATA", raising=False)
    monkeypatch.setattr("matvit.datasets.__file__", str(tmp_path / "site-packages" / "matvit" / "datasets.py"))
    with pytest.raises(DatasetError, match="set the environment variable MATVIT_DATA"):
        data_folder()


# --- the real data sets -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    pytest.importorskip("pyarrow", reason="pyarrow reads the data sets")
    try:
        return data_folder()
    except DatasetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("location", "classes", "pictures", "names"),
    [
        ("caltech-101/test", "50:101", 1050, 51),
        ("caltech-101/train", None, 5784, 101),
        ("grocery-store/iconic", None, 81, 81),
        ("clothing-small/validation", None, 341, 10),
        ("tiny-imagenet/val", None, 10_000, 200),
    ],
)
def test_the_public_data_sets_have_their_documented_sizes(
    real: Path, location: str, classes: str | None, pictures: int, names: int
) -> None:
    data = read_dataset(real / location, classes=classes)
    assert (len(data), len(data.class_names)) == (pictures, names)
    assert data.class_names == tuple(sorted(data.class_names))
    assert Image.open(io.BytesIO(bytes(data.images[len(data) - 1]))).size > (0, 0)  # type: ignore[arg-type]


def test_training_classes_that_the_tests_show_can_be_excluded(real: Path) -> None:
    shown = "n07873807 n01770393 n01768244 n04507155 n01983481 n01984695 n03637318 n04328186 n04099969 n07720875"
    shown += " n07734744 n07747607 n07749582 n07753592 n07768694"
    data = read_dataset(real / "tiny-imagenet" / "val", exclude=shown.split())
    assert len(data.class_names) == 185
    assert len(data) == 9250


@pytest.mark.parametrize("kind", ["string", "int64"])
def test_a_parquet_column_that_is_no_bytes_is_refused_rather_than_taken_for_a_path(tmp_path: Path, kind: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    value = "/etc/passwd" if kind == "string" else 7
    column = pa.array([{"bytes": value}], type=pa.struct({"bytes": getattr(pa, kind)()}))
    parquet.write_table(pa.table({"image": column, "label": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="has no column 'image' with bytes"):
        read_dataset(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_a_parquet_column_of_plain_bytes_is_one_of_pictures(tmp_path: Path, kind: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pa.array([encoded(1)], type=getattr(pa, kind)())
    parquet.write_table(pa.table({"image": column, "label": ["x"]}), tmp_path / "a.parquet")
    assert read_dataset(tmp_path / "a.parquet").images[0] == encoded(1)


def test_shards_of_short_and_of_long_binary_columns_are_read_together(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for row, kind in enumerate((pa.binary(), pa.large_binary())):
        column = pa.array([{"bytes": encoded(row)}], type=pa.struct({"bytes": kind}))
        parquet.write_table(pa.table({"image": column, "label": ["x"]}), tmp_path / f"train-{row}.parquet")
    assert [read_dataset(tmp_path).images[row] for row in (0, 1)] == [encoded(0), encoded(1)]


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.parquet"])
def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DatasetError, match="not a regular file"):
        read_dataset(tmp_path)
