"""Retrieval benchmarks in the folders that their authors publish: lists of files with classes and splits; no torch.

    CUB-200-2011              FOLDER (all), FOLDER/train, FOLDER/test    images.txt, image_class_labels.txt,
                                                                         train_test_split.txt
    Stanford Online Products  FOLDER/train, FOLDER/test                  Ebay_train.txt, Ebay_test.txt
    In-shop Clothes           FOLDER/train, FOLDER/query, FOLDER/gallery list_eval_partition.txt (also in Eval or Anno)

A folder is known by these files. Revisited Oxford and Paris have no classes: see `matvit.revisited`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matvit.errors import DatasetError
from matvit.regular import read_small

Listed = tuple[list[str], list[Path]]  # class name and file of each picture

IN_SHOP = "list_eval_partition.txt"
_IN_SHOP_FOLDERS = ("", "Eval", "Anno")
_IN_SHOP_SPLITS = ("train", "query", "gallery")


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
    files = _table(folder / "images.txt", unique=True)
    classes = _table(folder / "image_class_labels.txt")
    _check_covers(folder / "image_class_labels.txt", classes, files, "no class for image")
    _check_covers(folder / "images.txt", files or classes, classes, "no file for image")
    chosen = list(files)
    if split is not None:
        _check_split(folder, split, ("train", "test"))
        path = folder / "train_test_split.txt"
        is_training = _table(path)
        for image in files:
            if (given := is_training.get(image)) not in ("0", "1"):
                said = "nothing" if given is None else f"'{given}'"
                raise _malformed(path, f"says {said} of image {image}" + ("" if given is None else ", not 0 or 1"))
        chosen = [image for image in files if is_training[image] == str(int(split == "train"))]
    # The class's number alone does not sort as the numbers do; its name begins with it, padded.
    names = {number: number.zfill(3) for number in classes.values()}
    if (folder / "classes.txt").is_file():
        names = _table(folder / "classes.txt", unique=True)
        _check_covers(folder / "classes.txt", names, classes.values(), "no name for class")
    return [names[classes[image]] for image in chosen], [folder / "images" / files[image] for image in chosen]


# --- Stanford Online Products -------------------------------------------------------------------


def _is_products(folder: Path) -> bool:
    return (folder / "Ebay_train.txt").is_file() or (folder / "Ebay_test.txt").is_file()


def _read_products(folder: Path, split: str | None) -> Listed:
    _check_split(folder, split, ("train", "test"))
    path = folder / f"Ebay_{split}.txt"
    names: list[str] = []
    files: list[Path] = []
    for _, (image, product, _, file) in _fields(path, _lines(path), 4):
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
    _check_split(folder, split, _IN_SHOP_SPLITS)
    path = _in_shop_list(folder)
    assert path is not None
    root = folder if (folder / "img").is_dir() else folder / "Img"
    lines = _lines(path)
    rows = list(_fields(path, lines, 3, skip=1))
    if rows and rows[0][1][2] == "evaluation_status":  # the header
        rows = rows[1:]
    _check_count(path, lines[:1], len(rows))
    known: set[str] = set()
    for number, (file, _, status) in rows:
        if status not in _IN_SHOP_SPLITS:
            raise _malformed(path, f"line {number} says '{status}', not train, query or gallery")
        if file in known:
            raise _malformed(path, f"line {number} names {file} again")
        known.add(file)
    chosen = [(item, root / file) for _, (file, item, status) in rows if status == split]
    return [item for item, _ in chosen], [file for _, file in chosen]


def _check_count(path: Path, first: Sequence[str], rows: int) -> None:
    counted = "".join(first).strip()
    if not counted.isdecimal():
        raise _malformed(path, "line 1 is no number of pictures")
    if counted != str(rows):
        raise _malformed(path, f"line 1 counts {counted} pictures, and {rows} are listed")


# --- lists --------------------------------------------------------------------------------------

_LAYOUTS: Mapping[Callable[[Path], bool], Callable[[Path, str | None], Listed]] = {
    _is_cub: _read_cub,
    _is_products: _read_products,
    is_in_shop: _read_in_shop,
}


def _table(path: Path, *, unique: bool = False) -> dict[str, str]:
    """By its first field, the second of each line, which may be there only once if `unique`."""
    found: dict[str, str] = {}
    values: set[str] = set()
    for number, (key, value) in _fields(path, _lines(path), 2):
        if key in found:
            raise _malformed(path, f"line {number} tells of {key} again")
        if unique and value in values:
            raise _malformed(path, f"line {number} names {value} again")
        found[key] = value
        values.add(value)
    return found


def _check_covers(path: Path, there: Container[str], needed: Iterable[str], what: str) -> None:
    missing = next((one for one in needed if one not in there), None)
    if missing is not None:
        raise _malformed(path, f"has {what} {missing}")


def _fields(path: Path, lines: Sequence[str], count: int, *, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """The number of each line of `path` and its whitespace-separated fields."""
    for number, line in enumerate(lines[skip:], start=skip + 1):
        fields = line.split()
        if fields and len(fields) != count:
            raise _malformed(path, f"line {number} has {len(fields)} fields, not {count}")
        if fields:
            yield number, fields


def _lines(path: Path) -> list[str]:
    try:
        return read_small(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _malformed(path, "is no text") from error
    except OSError as error:
        raise DatasetError(
            what=f"cannot be read ({error.strerror})", where=str(path), fix="fetch the whole data set"
        ) from error


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
