"""Benchmarks' folders, as tiny look-alikes of what their authors publish."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matvit.datasets import LabelledImages, find_dataset, read_dataset
from matvit.errors import DatasetError, ImageError
from matvit.tasks import read_task


def picture(path: Path, *, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB_200_2011: ids from 1; the split says 1 for training."""
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "010.Red_winged_Blackbird"]
    files = [f"{name}/{name[4:]}_{number:04}.jpg" for name in names for number in (1, 2)]
    for file in files:
        picture(root / "images" / file)
    write(root / "images.txt", [f"{i} {file}" for i, file in enumerate(files, 1)])
    write(root / "image_class_labels.txt", ["1 1", "2 1", "3 2", "4 2", "5 10", "6 10"])
    write(root / "train_test_split.txt", ["1 1", "2 0", "3 1", "4 0", "5 0", "6 0"])
    write(root / "classes.txt", [f"{int(name[:3])} {name}" for name in names])
    return root


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """Stanford Online Products: a header, then image id, class id, super-class id, path."""
    root = tmp_path / "Stanford_Online_Products"
    header = "image_id class_id super_class_id path"
    write(root / "Ebay_train.txt", [header, "1 1 1 bicycle_final/111_0.JPG", "2 1 1 bicycle_final/111_1.JPG"])
    test = ["3 11319 1 bicycle_final/222_0.JPG", "4 11319 1 bicycle_final/222_1.JPG", "5 2 12 toaster_final/9_0.JPG"]
    write(root / "Ebay_test.txt", [header, *test])
    return root


@pytest.fixture
def in_shop(tmp_path: Path) -> Path:
    """In-shop: the number of rows, a header, then columns padded with spaces; lists in Eval, pictures in Img."""
    root = tmp_path / "In-shop Clothes Retrieval Benchmark"
    rows = [("01_1_front", "id_00000001", "train"), ("02_1_front", "id_00000002", "query")]
    rows += [("02_2_side", "id_00000002", "gallery"), ("03_1_front", "id_00000003", "gallery")]
    lines = [f"img/WOMEN/Dresses/{item}/{name}.jpg      {item} {status}" for name, item, status in rows]
    write(root / "Eval" / "list_eval_partition.txt", ["4", "image_name item_id evaluation_status", *lines])
    for name, item, _ in rows:
        picture(root / "Img" / "img" / "WOMEN" / "Dresses" / item / f"{name}.jpg")
    return root


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    root = tmp_path / "roxford5k"
    for name in ("all_souls_000013", "all_souls_000026", "christ_church_1", "christ_church_2", "oxford_1", "oxford_2"):
        picture(root / "jpg" / f"{name}.jpg", size=(40, 30))
    write(root / "gnd_roxford5k.json", [json.dumps(truth())])
    return root


def truth() -> dict[str, Any]:
    """The JSON form of the published pickle."""
    return {
        "imlist": ["all_souls_000026", "christ_church_2", "oxford_1", "oxford_2"],
        "qimlist": ["all_souls_000013", "christ_church_1"],
        "gnd": [
            {"bbx": [5.0, 4.4, 25.6, 24.0], "easy": [0], "hard": [2, 1], "junk": [3]},
            {"bbx": [0, 0, 100.0, 100.0], "easy": [], "hard": [1], "junk": []},
        ],
    }


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def classes(images: LabelledImages) -> list[str]:
    return [images.class_names[label] for label in images.labels]


def test_cub_is_read_whole_by_class_and_by_split(cub: Path) -> None:
    everything = read_dataset(cub)
    assert everything.class_names == (
        "001.Black_footed_Albatross",
        "002.Laysan_Albatross",
        "010.Red_winged_Blackbird",
    )
    assert all(Path(origin).is_file() for origin in everything.origins)
    assert classes(read_dataset(cub, classes="2:3")) == ["010.Red_winged_Blackbird"] * 2
    assert [Path(origin).name for origin in read_dataset(cub / "train").origins] == [
        "Black_footed_Albatross_0001.jpg",
        "Laysan_Albatross_0001.jpg",
    ]
    assert len(read_dataset(cub / "test")) == 4


@pytest.mark.parametrize(
    ("location", "is_below"),
    [
        ("CUB_200_2011", True),
        ("CUB_200_2011/test", True),
        ("CUB_200_2011/gone", True),  # `read_dataset` tells its splits
        ("CUB_200_2011/test/gone", False),
        ("food/train", True),
        ("food/train-*.tar", True),
        ("food", True),
        ("food/gone", False),
    ],
)
def test_what_is_not_there_as_given_is_found_below_the_data_folder(
    cub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, is_below: bool
) -> None:
    write(tmp_path / "food" / "train-00000-of-00001.tar", ["no tar"])
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path))
    assert find_dataset(location) == (str(tmp_path / location) if is_below else location)
    monkeypatch.chdir(tmp_path)
    assert find_dataset(location) == location


def test_cub_without_its_names_sorts_classes_by_number(cub: Path) -> None:
    (cub / "classes.txt").unlink()
    assert read_dataset(cub).class_names == ("001", "002", "010")


def test_online_products_are_read_by_split(products: Path) -> None:
    test = read_dataset(products / "test")
    assert test.class_names == ("00002", "11319")
    assert classes(test) == ["11319", "11319", "00002"]
    assert test.origins[0] == str(products / "bicycle_final/222_0.JPG")
    assert len(read_dataset(products / "train")) == 2
    with pytest.raises(DatasetError, match=r"splits train, test.*name one"):
        read_dataset(products)


@pytest.mark.parametrize("below", ["Eval", "Anno", "."])
def test_in_shop_brings_its_own_gallery(in_shop: Path, below: str) -> None:
    (in_shop / "Eval").rename(in_shop / "lists")
    target = in_shop / below / "list_eval_partition.txt"
    target.parent.mkdir(exist_ok=True)
    (in_shop / "lists" / "list_eval_partition.txt").rename(target)
    task = read_task(str(in_shop))
    assert isinstance(task.queries, LabelledImages)
    assert isinstance(task.gallery, LabelledImages)
    assert classes(task.queries) == ["id_00000002"]
    assert classes(task.gallery) == ["id_00000002", "id_00000003"]
    assert all(Path(origin).is_file() for origin in [*task.queries.origins, *task.gallery.origins])
    assert len(read_dataset(in_shop / "train")) == 1
    with pytest.raises(DatasetError, match="train, query, gallery, not 'test'"):
        read_task(str(in_shop / "test"))


@pytest.mark.parametrize(
    ("protocol", "positives", "junk"),
    [
        ("easy", ((0,), ()), ((1, 2, 3), (1,))),
        ("medium", ((0, 1, 2), (1,)), ((3,), ())),
        (None, ((0, 1, 2), (1,)), ((3,), ())),
        ("hard", ((1, 2), (1,)), ((0, 3), ())),
    ],
)
def test_revisited_protocols_are_those_of_the_paper(oxford: Path, protocol: Any, positives: Any, junk: Any) -> None:
    task = read_task(str(oxford), protocol=protocol)
    assert task.truth is not None
    assert (task.truth.positives, task.truth.junk) == (positives, junk)
    assert task.gallery is not None
    assert [Path(origin).stem for origin in task.gallery.origins] == truth()["imlist"]


def test_revisited_queries_are_cut_to_their_boxes(oxford: Path) -> None:
    queries = read_task(str(oxford)).queries
    assert [image.size for image in queries.images] == [(21, 20), (40, 30)]  # rounded; cut at the picture's edge


def test_a_query_box_outside_of_its_picture_is_an_unreadable_picture(oxford: Path) -> None:
    raw = truth()
    raw["gnd"][0]["bbx"] = [50, 0, 60, 10]
    write(oxford / "gnd_roxford5k.json", [json.dumps(raw)])
    with pytest.raises(ImageError, match="box is outside"):
        read_task(str(oxford)).queries.images[0]


def test_a_pickle_is_never_opened(oxford: Path) -> None:
    (oxford / "gnd_roxford5k.json").unlink()
    (oxford / "gnd_roxford5k.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DatasetError, match=r"can run any code.*convert it to gnd_roxford5k\.json"):
        read_task(str(oxford))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gnd": []}, "2 query pictures, and the truth about 0"),
        ({"imlist": ["one"]}, "not in imlist"),
        ({"qimlist": [1, 2]}, "qimlist"),
        ({"gnd": [{"bbx": [1, 2, 3], "easy": [], "hard": [], "junk": []}] * 2}, "bbx"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [-1], "hard": [], "junk": []}] * 2}, "easy"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [True], "hard": [], "junk": []}] * 2}, "easy"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [0.0], "hard": [], "junk": []}] * 2}, "easy"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": ["0"], "hard": [], "junk": []}] * 2}, "easy"),
        ({"gnd": [{"bbx": [0, 0, 1, 1], "easy": [0], "hard": [], "junk": [0]}] * 2}, "in two of easy, hard and junk"),
        ({"imlist": ["all_souls_000026"] * 4}, r"\(imlist names a picture twice\)"),
        ({"imlist": [], "qimlist": [], "gnd": []}, "imlist names no picture"),
        ({"qimlist": [], "gnd": []}, "qimlist names no picture"),
        (
            {"imlist": ["a", "b", "c" * 5000, "d\0"]},
            r"jpg: holds none of the 4 pictures that imlist names, such as a\.jpg",
        ),
    ],
)
def test_a_malformed_truth_is_one_sentence(oxford: Path, change: dict[str, Any], why: str) -> None:
    write(oxford / "gnd_roxford5k.json", [json.dumps(truth() | change)])
    with pytest.raises(DatasetError, match=why) as caught:
        read_task(str(oxford))
    assert "\n" not in str(caught.value)


def test_a_truth_that_gives_a_list_twice_is_refused(oxford: Path) -> None:
    path = oxford / "gnd_roxford5k.json"
    path.write_text(path.read_text().replace("{", '{"imlist": [], ', 1))
    with pytest.raises(DatasetError, match="imlist, qimlist, gnd is given twice"):
        read_task(str(oxford))


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_list_is_not_waited_for(oxford: Path, cub: Path) -> None:
    for file, where in ((oxford / "gnd_roxford5k.json", oxford), (cub / "train_test_split.txt", cub / "test")):
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(DatasetError, match=rf"{file.name}: cannot be read \(not a regular file\)"):
            read_task(str(where))


def test_options_that_do_not_fit_the_data_are_refused(oxford: Path, cub: Path) -> None:
    with pytest.raises(DatasetError, match="brings its own gallery"):
        read_task(str(oxford), gallery=str(cub))
    with pytest.raises(DatasetError, match="has no classes"):
        read_task(str(oxford), classes="0:1")
    with pytest.raises(DatasetError, match="leave --protocol out"):
        read_task(str(cub), protocol="hard")
    (oxford / "gnd_rparis6k.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"gnd_roxford5k\.json, gnd_rparis6k\.json"):
        read_task(str(oxford))


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("images.txt", b"1 one.jpg\n2\n", "line 2 has 1 fields, not 2"),
        ("images.txt", b"\xff\xfe\x00", "is no text"),
        ("images.txt", b"", "name no pictures"),
        ("images.txt", b"1 a.jpg\n", "images.txt: has no file for image 2"),
        ("images.txt", b"1 a.jpg\n1 b.jpg\n", "images.txt: line 2 tells of 1 again"),
        ("images.txt", b"1 a.jpg\n2 a.jpg\n", r"images.txt: line 2 names a\.jpg again"),
        ("image_class_labels.txt", b"1 1\n", "no class for image 2"),
        ("image_class_labels.txt", b"1 1\n2 1\n1 2\n", "labels.txt: line 3 tells of 1 again"),
        ("classes.txt", b"1 A\n2 B\n", "classes.txt: has no name for class 10"),
        ("classes.txt", b"1 A\n2 A\n", "classes.txt: line 2 names A again"),
    ],
)
def test_malformed_lists_are_one_sentence(cub: Path, file: str, content: bytes, why: str) -> None:
    (cub / file).write_bytes(content)
    with pytest.raises(DatasetError, match=why):
        read_dataset(cub)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"1 1\n", "says nothing of image 2"),
        (b"1 train\n2 test\n", "says 'train' of image 1, not 0 or 1"),
        (b"1 1\n1 0\n", "line 2 tells of 1 again"),
    ],
)
def test_a_split_that_is_cut_short_or_contradicts_itself_is_refused(cub: Path, content: bytes, why: str) -> None:
    (cub / "train_test_split.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"train_test_split\.txt: {why}"):
        read_dataset(cub / "test")


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (
            ["99", "image_name item_id evaluation_status", "a.jpg 1 query"],
            "line 1 counts 99 pictures, and 1 are listed",
        ),
        (["a.jpg 1 query", "b.jpg 1 gallery"], "line 1 is no number of pictures"),
        (["1", "a.jpg 1 Query"], "line 2 says 'Query', not train, query or gallery"),
        (["2", "a.jpg 1 query", "a.jpg 1 gallery"], r"line 3 names a\.jpg again"),
    ],
)
def test_an_in_shop_list_that_contradicts_itself_is_refused(in_shop: Path, lines: list[str], why: str) -> None:
    write(in_shop / "Eval" / "list_eval_partition.txt", lines)
    with pytest.raises(DatasetError, match=rf"list_eval_partition\.txt: {why}"):
        read_dataset(in_shop / "query")


def test_a_byte_order_mark_is_no_part_of_a_list(cub: Path) -> None:
    (cub / "images.txt").write_text((cub / "images.txt").read_text(), encoding="utf-8-sig")
    assert len(read_dataset(cub)) == 6


def test_a_missing_list_is_told(cub: Path) -> None:
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(DatasetError, match=r"train_test_split\.txt: cannot be read"):
        read_dataset(cub / "test")


def test_class_folders_beside_no_list_stay_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "cats" / "1.png")
    images = read_dataset(tmp_path)
    assert np.array_equal(images.labels, [0])
