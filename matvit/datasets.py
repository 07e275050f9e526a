"""Labelled pictures from class folders, Hugging Face parquet files, tar shards or a benchmark's folder; no torch.

A location is one of
    FOLDER            a benchmark's folder, or FOLDER/SPLIT for one of its splits: see `matvit.layouts`
    FOLDER            pictures in class folders; the class is the folder's path below FOLDER
    FOLDER            parquet or tar shards of one split; tars are in webdataset's layout: see `matvit.tars`
    FOLDER/SPLIT      the shards FOLDER/SPLIT-*.parquet or FOLDER/SPLIT-*.tar
    FILE              one parquet or tar file
    GLOB              shards, for example "food/train-*.parquet"
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from matvit import layouts, tars
from matvit.errors import DatasetError, MissingExtraError
from matvit.preprocess import RAW_SUFFIXES, Absent, ImageSource
from matvit.regular import check_regular
from matvit.walk import walk_files

T = TypeVar("T")

_SHARD_SUFFIXES = (".parquet", ".tar")

LabelArray = npt.NDArray[np.int64]

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    # Not read: named here so that they are skipped with a reason, not passed over.
    | {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", *RAW_SUFFIXES}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedPicture:
    """A picture that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """N pictures, in an order that depends on the data alone."""

    name: str  # the location as given, with the selection of classes
    images: Sequence[ImageSource]  # N paths, or encoded bytes or crops that are fetched on access
    origins: Sequence[str]  # N texts for messages: the path, or the parquet file and row

    def __len__(self) -> int:
        return len(self.origins)


@dataclass(frozen=True, kw_only=True)
class LabelledImages(Pictures):
    """N pictures with a class each."""

    class_names: tuple[str, ...]  # sorted; only the selected ones, also those without a picture here
    labels: LabelArray  # (N,) indices into class_names

    @cached_property
    def sha256(self) -> str:
        """Hex fingerprint of class names, labels and the pictures' encoded bytes; reads every picture once.

        Raises DatasetError when a picture's file can no longer be read.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        for image, origin in zip(self.images, self.origins, strict=True):
            content = _encoded(image, origin)
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Per query, what a benchmark lists of the gallery, as positions in it; what it does not list is wrong."""

    positives: tuple[tuple[int, ...], ...]
    junk: tuple[tuple[int, ...], ...]  # taken out of the ranking, neither right nor wrong


def data_folder() -> Path:
    """The folder of the public data sets: `MATVIT_DATA`, or ../shared/data beside the project's root.

    Raises DatasetError when neither is a folder.
    """
    given = os.environ.get("MATVIT_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        raise DatasetError(
            what="no such folder" if given else "the data sets are not there",
            where=f"MATVIT_DATA={given}" if given else str(folder),
            fix="set the environment variable MATVIT_DATA to the folder that holds the data sets",
        )
    return folder


def portable(location: str) -> str:
    """An absolute path from the data folder on, or its last name: nothing of the machine's folders is told."""
    path = Path(location)
    if not path.is_absolute():
        return location
    try:
        return path.relative_to(data_folder()).as_posix()
    except (DatasetError, ValueError):
        return path.name


def find_dataset(location: str) -> str:
    """`location` as given, or below the data folder where only that is there."""
    try:
        below = str(data_folder() / location)
        return below if _is_there(below) and not _is_there(location) else location
    except (DatasetError, OSError):  # no data folder; of what may not be looked at, `read_dataset` tells
        return location


def _is_there(location: str) -> bool:
    path = Path(location)
    return path.exists() or layouts.is_split(path) or bool(_matching(location))


def read_dataset(location: str | Path, *, classes: str | None = None, exclude: Sequence[str] = ()) -> LabelledImages:
    """The labelled pictures at `location` (see the module's text); parquet bytes stay in memory, encoded.

    `classes` keeps some of the sorted class names, by index: a slice "50:101" or a list "0,3,7".
    `exclude` leaves out classes by name, or by the name's first word ("n07753592" for "n07753592 banana").
    Indices count before anything is left out.

    Raises DatasetError for a missing or empty data set, for one that is in no known layout, and for
    classes that it does not have; MissingExtraError when parquet cannot be read here.
    """
    try:
        rows = _read(str(location))
    except OSError as error:  # in a folder that may not be read, or no file name at all
        raise _error(location, f"cannot be looked up ({error.strerror})", "check the path") from error
    selected = _select_classes(rows.class_names, classes, exclude, str(location))
    keep = np.flatnonzero(np.isin(rows.labels, selected))
    if not len(keep):
        raise _error(location, "no pictures are in the selected classes", "select other classes")
    return LabelledImages(
        name=str(location) if classes is None else f"{location} [{classes}]",
        class_names=tuple(rows.class_names[index] for index in selected),
        labels=np.searchsorted(selected, rows.labels[keep]).astype(np.int64),
        images=_Subset(rows.images, keep),
        origins=_Subset(rows.origins, keep),
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Everything at a location, before classes are selected."""

    class_names: tuple[str, ...]  # sorted
    labels: LabelArray
    images: Sequence[ImageSource]
    origins: Sequence[str]


def _error(location: str | Path, what: str, fix: str) -> DatasetError:
    return DatasetError(what=what, where=str(location), fix=fix)


class _Subset(Sequence[T]):
    """The chosen rows of a sequence, fetched on access."""

    def __init__(self, whole: Sequence[T], rows: npt.NDArray[np.intp]) -> None:
        self._whole = whole
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _Subset(self._whole, self._rows[index])
        return self._whole[int(self._rows[index])]


class _Members(Sequence[bytes]):
    """Pictures in tar shards, read on access; `Absent` where that fails."""

    def __init__(self, members: Sequence[tars.LabelledMember]) -> None:
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return _Members(self._members[index])
        try:
            return self._members[index].read()
        except OSError as error:
            return Absent(error.strerror or "cannot be read")


class _ArrowBytes(Sequence[bytes]):
    """A binary arrow column as a sequence of bytes; a null becomes `Absent`."""

    def __init__(self, column: Any) -> None:
        self._column = column  # pyarrow.ChunkedArray

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return _ArrowBytes(self._column[index])
        content: bytes | None = self._column[index].as_py()
        return content or Absent("the row holds no bytes of a picture")


def _read(location: str) -> _Rows:
    listed = layouts.find(Path(location))
    if listed is not None:
        names, files = listed
        return _of_files(names, files)
    shards = _shards(location)
    if shards is None:
        return _read_tree(Path(location))
    for shard in shards:
        try:
            check_regular(shard)
        except OSError as error:
            raise _error(shard, f"cannot be read ({error.strerror})", "give files that can be read") from error
    return _read_tars(shards, location) if shards[0].suffix == ".tar" else _read_parquet(shards, location)


def _of_files(names: Sequence[str], files: Sequence[Path]) -> _Rows:
    class_names, labels = np.unique(np.array(names), return_inverse=True)
    return _Rows(
        class_names=tuple(map(str, class_names)),
        labels=labels.astype(np.int64),
        images=files,
        origins=[str(path) for path in files],
    )


# --- where the data are -------------------------------------------------------------------------


def _shards(location: str) -> list[Path] | None:
    """The parquet or tar files that `location` names, sorted, or None for a tree of pictures."""
    path = Path(location)
    if path.is_file():
        if path.suffix not in _SHARD_SUFFIXES:
            raise _error(location, "is a file, but no parquet and no tar file", "give a .parquet file or a folder")
        return [path]
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        shards = _those_of(inside)
        if any(entry.is_dir() for entry in inside):  # then a tar is an archive that was unpacked here
            shards = [shard for shard in shards if shard.suffix != ".tar"]
        return _one_complete_split(shards, location) if shards else None
    matches = _matching(location)
    if not matches:
        raise _error(
            location, "no such data set", "give one that is there, or set MATVIT_DATA to the folder that it lies below"
        )
    return _one_complete_split(matches, location)


def _matching(location: str) -> list[Path]:
    """The shards of the split that `location` names, or of the pattern."""
    path = Path(location)
    beside = _those_of(path.parent.glob("[!.]*")) if path.parent.is_dir() else []
    split = [shard for shard in beside if _split_of(shard) == path.name]
    return split or _those_of(map(Path, glob.glob(location)))  # noqa: PTH207


def _those_of(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix in _SHARD_SUFFIXES)


# "train-00000-of-00003", "train-0", "0000"; but "cifar10" and "fold1" are names of their own.
_SHARD = re.compile(r"(?P<split>.*?)([-_.]?\d+-of-(?P<count>\d+).*|(^|[-_.])\d+)?")


def _split_of(shard: Path) -> str:
    match = _SHARD.fullmatch(shard.stem)
    return match["split"] if match else shard.stem


def _one_complete_split(shards: list[Path], location: str) -> list[Path]:
    if len({shard.suffix for shard in shards}) > 1:
        raise _error(location, "holds parquet files and tar shards", f"name one sort: {shards[0].parent / '*.tar'}")
    splits = sorted({_split_of(shard) for shard in shards})
    if len(splits) > 1:
        folder = shards[0].parent
        raise _error(location, f"holds the splits {', '.join(splits)}", f"name one, for example {folder / splits[0]}")
    counts = {match["count"] for shard in shards if (match := _SHARD.fullmatch(shard.stem)) and match["count"]}
    if counts and {int(count) for count in counts} != {len(shards)}:
        expected = " or ".join(sorted(str(int(count)) for count in counts))
        raise _error(location, f"{len(shards)} of {expected} shards are there", "fetch the missing shards")
    return shards


# --- a tree of pictures -------------------------------------------------------------------------


def _read_tree(root: Path) -> _Rows:
    files = sorted(_pictures(root), key=Path.as_posix)
    if not files:
        raise _error(root, "holds no pictures, parquet files or tar shards", "give a folder of class folders")
    names = [path.parent.relative_to(root).as_posix() for path in files]
    stray = names.count(".")
    if stray:
        what = f"{stray} pictures, such as {files[names.index('.')].name}, are in no class folder"
        raise _error(root, what, "move each picture into a folder that is named after its class")
    return _of_files(names, files)


def _pictures(root: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise _error(error.filename, f"folder cannot be read ({error.strerror})", "give access to it") from error

    return [path for path in map(Path, walk_files(root, on_error=refuse)) if path.suffix.lower() in PICTURE_SUFFIXES]


# --- parquet ------------------------------------------------------------------------------------


def _read_parquet(files: Sequence[Path], location: str) -> _Rows:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtraError.for_extra("parquet", purpose="reading parquet files") from error
    columns: list[Any] = []
    names: list[str] = []
    known: set[str] = set()
    origins: list[str] = []
    for file in files:
        table = _read_table(file)
        file_labels = _label_column(table, file)
        file_classes = schema_names(table.schema)
        known.update(file_classes)
        names += _names_of(file_labels, file_classes, file)
        columns += table.column("image.bytes").cast(pa.large_binary()).chunks
        origins += [f"{file} row {row}" for row in range(len(table))]
    if not names:
        raise _error(location, "holds no rows", "give parquet files with pictures")
    class_names = sorted(known.union(names))
    position = {name: index for index, name in enumerate(class_names)}
    return _Rows(
        class_names=tuple(class_names),
        labels=np.array([position[name] for name in names], dtype=np.int64),
        images=_ArrowBytes(pa.chunked_array(columns)),
        origins=origins,
    )


def _read_table(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, partitioning=None).flatten()
    except (pa.ArrowException, OSError, ValueError) as error:  # the latter: names that are not UTF-8
        raise _error(file, "is no readable parquet file", "fetch it again") from error
    plain = [field.name == "image" and _is_bytes(field.type) for field in table.schema]  # without the structure
    names = ["image.bytes" if one else name for one, name in zip(plain, table.column_names, strict=True)]
    table = table.rename_columns(names).replace_schema_metadata(table.schema.metadata)  # a renamed one has none
    for name in ("image.bytes", "label"):
        if table.column_names.count(name) > 1:
            raise _error(file, f"has two columns '{name}'", "keep one of them")
    # A text would be taken for the path of a picture.
    kinds = [field.type for field in table.schema if field.name == "image.bytes"]
    if not kinds or not _is_bytes(kinds[0]):
        raise _error(file, "has no column 'image' with bytes", "use the Hugging Face form image{bytes, path}, label")
    return table


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(table: Any, file: Path) -> list[int | str]:
    if "label" not in table.column_names:
        raise _error(file, "has no column 'label'", "use the Hugging Face form image{bytes, path}, label")
    labels: list[int | str] = table.column("label").to_pylist()
    if not all(isinstance(label, int | str) for label in labels):
        raise _error(file, "has rows whose label is no number and no text", "give every row a label")
    return labels


def schema_names(schema: Any) -> list[str]:
    """Names of a Parquet table's classes, from the Hugging Face metadata of its schema; empty when it has none."""
    metadata = schema.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _names_of(labels: Sequence[int | str], class_names: Sequence[str], file: Path) -> list[str]:
    if not class_names:
        return [str(label) for label in labels]
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if class_names.count(name) > 1)
        raise _error(file, f"two of its classes have the name '{twice}'", "give each a name of its own")
    unnamed = [label for label in labels if not (isinstance(label, int) and 0 <= label < len(class_names))]
    if unnamed:  # Hugging Face writes -1 for "unlabelled"
        what = f"{len(unnamed)} rows have a label, such as {unnamed[0]}, outside the {len(class_names)} named classes"
        raise _error(file, what, "use a split that is labelled")
    return [class_names[int(label)] for label in labels]


# --- tar shards ---------------------------------------------------------------------------------


def _read_tars(files: Sequence[Path], location: str) -> _Rows:
    members = [member for file in files for member in tars.labelled_members(file, suffixes=PICTURE_SUFFIXES)]
    if not members:
        raise _error(location, "holds no pictures", "give tar shards in webdataset's layout: key.jpg, key.cls")
    class_names, labels = np.unique(np.array([member.label for member in members]), return_inverse=True)
    return _Rows(
        class_names=tuple(map(str, class_names)),
        labels=labels.astype(np.int64),
        images=_Members(members),
        origins=[f"{member.shard}#{member.name}" for member in members],
    )


# --- which classes ------------------------------------------------------------------------------


def _select_classes(
    names: Sequence[str], classes: str | None, exclude: Sequence[str], location: str
) -> npt.NDArray[np.int64]:
    """Sorted indices into `names`."""
    chosen = set(range(len(names)) if classes is None else _parse_classes(classes, len(names), location))
    for excluded in exclude:
        matches = {index for index, name in enumerate(names) if excluded in (name, name.split(" ")[0])}
        if not matches:
            raise _error(location, f"has no class '{excluded}' to leave out", "exclude only classes that it has")
        chosen -= matches
    if not chosen:
        raise _error(location, "no class is left", "select more classes or exclude fewer")
    return np.array(sorted(chosen), dtype=np.int64)


def _parse_classes(text: str, count: int, location: str) -> Sequence[int]:
    numbers: Sequence[int] = ()
    if match := re.fullmatch(r"(\d{,9}):(\d{,9})", text.strip()):
        numbers = range(int(match[1] or 0), min(int(match[2] or count), count + 1))
    elif re.fullmatch(r"\d{1,9}(\s*,\s*\d{1,9})*", text.strip()):
        numbers = [int(number) for number in text.split(",")]
    if not numbers or max(numbers) >= count:
        raise _error(
            location,
            f"classes '{text}' does not select from its {count} classes",
            f"give a slice such as 0:{count} or a list such as 0,{count - 1} of the sorted class names",
        )
    return numbers


def _encoded(image: ImageSource, origin: str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        if isinstance(image, str | os.PathLike):
            check_regular(Path(image))
            return Path(image).read_bytes()
    except OSError as error:
        raise _error(origin, f"cannot be read ({error.strerror})", "restore the file, or take it away") from error
    return image.tobytes()
