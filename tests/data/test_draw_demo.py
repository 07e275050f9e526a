"""Drawing the demo photographs: repeatable, and the same from parquet files and from the public originals."""

import filecmp
import json
from pathlib import Path

import pytest
from PIL import Image
from typer import Exit

from matvit.datasets import data_folder
from matvit.errors import DatasetError
from matvit_data import demo_folder
from matvit_data.draw_demo import draw_demo, main

CALTECH = [f"class_{number:03}" for number in range(101)]


def save(path: Path, size: tuple[int, int], shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 60, 90)).save(path)


@pytest.fixture
def originals(tmp_path) -> Path:
    """Tiny look-alikes of the data sets as their publishers lay them out."""
    data = tmp_path / "originals"
    grocery = data / "GroceryStoreDataset/dataset"
    for name in ("Fruit/Apple/Golden-Delicious", "Vegetables/Leek"):
        leaf = name.rpartition("/")[2]
        save(grocery / "iconic-images-and-descriptions" / name / f"{leaf}_Iconic.jpg", (300, 400), 10)
        (grocery / "iconic-images-and-descriptions" / name / f"{leaf}_Description.txt").write_text("text")
        for number in range(7):
            save(grocery / "test" / name / f"{leaf}_{number:03}.jpg", (348, 464), number * 30)
    for name in ("BACKGROUND_Google", *CALTECH):
        for number in range(5):
            save(data / "101_ObjectCategories" / name / f"image_{number:04}.jpg", (40, 30), number * 40)
    for number in range(6):
        save(data / "clothing-dataset-small/test/t-shirt" / f"{number}.jpg", (400, 600), number * 40)
    return data


def drawn(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "demo.json").read_text(encoding="utf-8"))["photos"]


def test_public_originals_give_one_folder_per_class(originals, tmp_path):
    out = tmp_path / "demo"
    assert draw_demo(originals, out) == 2 * (1 + 3) + 51 * 4 + 5
    photos = drawn(out)
    assert {photo["class"] for photo in photos} == {"Apple-Golden-Delicious", "Leek", *CALTECH[50:], "t-shirt"}
    captions = {photo["caption"] for photo in photos}
    assert "Golden Delicious apple in a grocery store, photographed with a phone." in captions
    assert "A photograph of a T-shirt." in captions
    assert {photo["set"] for photo in photos if not photo["counted"]} == {"clothing-small"}


def test_large_pictures_are_reduced_and_small_ones_never_enlarged(originals, tmp_path):
    draw_demo(originals, tmp_path / "demo")
    sizes = {}
    for photo in drawn(tmp_path / "demo"):
        with Image.open(tmp_path / "demo" / photo["path"]) as image:
            sizes[photo["set"]] = image.size
    assert sizes == {"grocery-store": (160, 213), "caltech-101": (40, 30), "clothing-small": (160, 240)}


def test_a_new_drawing_replaces_the_old_one_and_no_other_folder(originals, tmp_path):
    out = tmp_path / "demo"
    draw_demo(originals, out)
    stale = out / "images/stale.webp"
    stale.touch()
    draw_demo(originals, out)
    assert not stale.exists()
    (out / "demo.json").unlink()
    with pytest.raises(DatasetError, match="not an earlier drawing"):
        draw_demo(originals, out)
    assert (out / "images").is_dir()


def test_missing_data_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(Exit) as caught:
        main(out=tmp_path / "demo", data=tmp_path)
    assert caught.value.exit_code == 2
    message = capsys.readouterr().err
    assert "grocery-store/iconic: no such data set" in message
    assert message.count("\n") == 1


def test_drawing_again_gives_the_committed_pictures(tmp_path):
    try:
        data = data_folder()
    except DatasetError as error:
        pytest.skip(str(error))
    draw_demo(data, tmp_path / "demo")
    assert (tmp_path / "demo/demo.json").read_bytes() == (demo_folder() / "demo.json").read_bytes()
    paths = [photo["path"] for photo in drawn(tmp_path / "demo")]
    _, differing, missing = filecmp.cmpfiles(tmp_path / "demo", demo_folder(), paths, shallow=False)
    assert (differing, missing) == ([], [])
