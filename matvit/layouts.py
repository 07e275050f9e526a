"""Retrieval benchmarks in the folders that their authors publish: lists of files with classes and splits; no torch.

    CUB-200-2011              FOLDER (all), FOLDER/train, FOLDER/test    images.txt, image_class_labels.txt,
                                                                         train_test_split.txt
    Stanford Online Products  FOLDER/train, FOLDER/test                  Ebay_train.txt, Ebay_test.txt
    In-shop Clothes           FOLDER/train, FOLDER/query, FOLDER/gallery list_eval_partition.txt (also in Eval or Anno)

A folder is known by these files. Revisited Oxford and Paris have no classes: see `matvit.revisited`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from matvit.errors import DatasetError

Listed = tuple[list[str], list[Path]]  # class name and file of each picture

IN_SHOP = "list_eval_partition.txt"
_IN_SHOP_FOLDERS = ("", "Eval", "Anno")


def find(location: Path) -> Listed | None:
    """The pictures of a benchmark's folder or of its split, or None when `location` is neither.

    Raises DatasetError for a list that is malformed, and for a split that the benchmark does not have.
    """
    for detect, read in _LAYOUTS.items():
        if detect(location):
            return _not_empty(location, read(location, None))
        if not location.exists() and detect(location.parent):
            return _not_empty(location, read(location.parent, location.name))
    return None


def is_split(location: Path) -> bool:
    """Whether `location`, where nothing is, may name a split of the benchmark in the folder above."""
    return any(detect(location.parent) for detect in _LAYOUTS)


def is_in_shop(folder: Path) -> bool:
    """Whether `folder` holds the In-shop benchmark, which says itself what is query and what is gallery."""
    return _in_shop_list(folder) is not None


# --- CUB-200-2011 -------------------------------------------------------------------------------


def _is_cub(folder: Path) -> bool:
    return (folder / "images.txt").is_file() and (folder / "image_class_labels.txt").is_file()


def _read_cub(folder: Path, split: str | None) -> Listed:
    files = dict(_pairs(folder / "images.txt"))
    classes = dict(_pairs(folder / "image_class_labels.txt"))
    names = dict(_pairs(folder / "classes.txt")) if (folder / "classes.txt").is_file() else {}
    chosen = list(files)
    if split is not None:
        _check_split(folder, split, ("train", "test"))
        is_training = dict(_pairs(folder / "train_test_split.txt"))
        chosen = [image for image in files if is_training.get(image) == str(int(split == "train"))]
    unlabelled = [image for image in chosen if image not in classes]
    if unlabelled:
        raise _malformed(folder / "image_class_labels.txt", f"has no class for image {unlabelled[0]}")
    # The class's number alone does not sort as the numbers do; its name begins with it, padded.
    labels = [names.get(classes[image], classes[image].zfill(3)) for image in chosen]
    return labels, [folder / "images" / files[image] for image in chosen]


# --- Stanford Online Products -------------------------------------------------------------------


def _is_products(folder: Path) -> bool:
    return (folder / "Ebay_train.txt").is_file() or (folder / "Ebay_test.txt").is_file()


def _read_products(folder: Path, split: str | None) -> Listed:
    _check_split(folder, split, ("train", "test"))
    path = folder / f"Ebay_{split}.txt"
    names: list[str] = []
    files: list[Path] = []
    for image, product, _, file in _fields(path, 4):
        if image == "image_id":  # the header
            continue
        names.append(product.zfill(5))  # so that names sort as the numbers do
        files.append(folder / file)
    return names, files


# --- In-shop Clothes ----------------------------------------------------------------------------


def _in_shop_list(folder: Path) -> Path | None:
    candidates = (folder / below / IN_SHOP for below in _IN_SHOP_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def _read_in_shop(folder: Path, split: str | None) -> Listed:
    _check_split(folder, split, ("train", "query", "gallery"))
    path = _in_shop_list(folder)
    assert path is not None
    root = folder if (folder / "img").is_dir() else folder / "Img"
    names: list[str] = []
    files: list[Path] = []
    for file, item, status in _fields(path, 3, skip=1):  # the first line counts the rows
        if status == split:
            names.append(item)
            files.append(root / file)
    return names, files


# --- lists --------------------------------------------------------------------------------------

_LAYOUTS: Mapping[Callable[[Path], bool], Callable[[Path, str | None], Listed]] = {
    _is_cub: _read_cub,
    _is_products: _read_products,
    is_in_shop: _read_in_shop,
}


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in _fields(path, 2))


def _fields(path: Path, count: int, *, skip: int = 0) -> Iterator[list[str]]:
    """The whitespace-separated fields of each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _malformed(path, "is no text") from error
    except OSError as error:
        raise DatasetError(
            what=f"cannot be read ({error.strerror})", where=str(path), fix="fetch the whole data set"
        ) from error
    for number, line in enumerate(lines[skip:], start=skip + 1):
        fields = line.split()
        if fields and len(fields) != count:
            raise _malformed(path, f"line {number} has {len(fields)} fields, not {count}")
        if fields:
            yield fields


def _not_empty(location: Path, listed: Listed) -> Listed:
    if not listed[0]:
        raise _malformed(location, "its lists name no pictures")
    return listed


def _check_split(folder: Path, split: str | None, known: tuple[str, ...]) -> None:
    if split not in known:
        raise DatasetError(
            what=f"holds the splits {', '.join(known)}" + ("" if split is None else f", not '{split}'"),
            where=str(folder),
            fix=f"name one, for example {folder / known[-1]}",
        )


def _malformed(path: Path, what: str) -> DatasetError:
    return DatasetError(what=what, where=str(path), fix="fetch it again")
