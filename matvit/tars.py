"""Tar shards in webdataset's layout: members whose names agree up to the first dot are one sample. No torch.

fox-1.jpg  fox-1.cls  fox-1.json  fox-2.jpg ...
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from matvit.errors import DatasetError
from matvit.preprocess import MAX_FILE_BYTES

_MOST_SAID = 2**20  # bytes of a .json, .cls or .txt: far more than any has
_MOST_PADDING = 2**20  # bytes behind the end that are looked at: tar itself writes up to 10 KiB of zeros
_LINK = "a link in the shard is not followed; write it with: tar --dereference --hard-dereference"
_NOT_PLAIN = "is no plain file in the shard; write it with tar, without --sparse"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard
_DESCRIBES = {".json": "json", ".cls": "label", ".txt": "caption"}  # members beside a picture, as metadata


def headers(file: BinaryIO, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that are no folders. What is wrong with it is added to `damage`, and ends it."""
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or else it keeps every header
                if entry.size < 0:
                    raise tarfile.HeaderError("negative size")
                if not entry.isdir():
                    yield entry
            # tarfile takes damage for the end, and the end of the file, too: a whole tar ends with blocks of zeros.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                damage.append(f"damaged tar shard (at byte {tar.offset})")
            elif file.read(_MOST_PADDING).strip(b"\0"):
                damage.append("holds more behind its end, as tars joined by cat do; unpack it and write it again")
    except tarfile.TarError as error:
        file.seek(0)
        if file.read(6).startswith(_COMPRESSED):
            damage.append("a compressed tar; unpack it to a plain .tar")
        else:
            damage.append(f"damaged tar shard ({error})")
    except (ValueError, EOFError, IndexError, OverflowError, RecursionError):  # RecursionError: for names without end
        damage.append("damaged tar shard")


class _Headers:
    """What tarfile reads of a file: headers, of which a long name or its like may claim any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Raises tarfile.HeaderError for more than any header has."""
        if size > _MOST_SAID:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self._file.read(size)


def name_of(entry: tarfile.TarInfo) -> str:
    """A member's name as users write it."""
    return entry.name.removeprefix("./")


def problem_of(entry: tarfile.TarInfo) -> str | None:
    """Why a member's bytes do not lie in the tar as they are; None where they do."""
    if entry.islnk() or entry.issym():
        return _LINK
    return None if entry.isreg() and not entry.issparse() else _NOT_PLAIN


def samples(file: BinaryIO, damage: list[str]) -> Iterator[list[tarfile.TarInfo]]:
    """The members of each sample in a tar; hidden ones and those in hidden folders are left out, as they are on disk.

    As `headers` for what is wrong with the tar.
    """
    shown = (entry for entry in headers(file, damage) if not _is_hidden(entry))
    for _, members in groupby(shown, key=_sample_of):
        yield list(members)


def _is_hidden(entry: tarfile.TarInfo) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in entry.name.split("/"))


def _sample_of(entry: tarfile.TarInfo) -> str:
    folder, name = os.path.split(name_of(entry))
    return f"{folder}/{name.partition('.')[0]}"


def describes(entry: tarfile.TarInfo) -> bool:
    """Whether a member says something of the picture beside it."""
    return PurePosixPath(entry.name).suffix.lower() in _DESCRIBES


def description(entry: tarfile.TarInfo, content: bytes) -> dict[str, Any]:
    """What such a member says: a JSON object's fields, `label` or `caption`. Raises ValueError, RecursionError."""
    if (problem := problem_of(entry)) is not None:
        raise ValueError(problem)
    kind, text = _DESCRIBES[PurePosixPath(entry.name).suffix.lower()], content.decode("utf-8")
    if kind == "json":
        value = json.loads(text)
        return value if isinstance(value, dict) else {"json": value}
    text = text.strip()
    is_number = kind == "label" and text.isdecimal() and str(int(text)) == text  # "007" and "7" are two classes
    return {kind: int(text) if is_number else text}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledMember:
    """A picture in a shard on disk; read when it is wanted."""

    shard: Path
    name: str
    label: str
    offset: int  # of its bytes
    size: int
    problem: str | None  # why these are no picture's

    def read(self) -> bytes:
        """Its encoded bytes. Raises OSError."""
        if self.problem is not None:
            raise OSError(errno.EINVAL, self.problem, str(self.shard))
        if self.size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, "larger than any picture", str(self.shard))
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def labelled_members(shard: Path, *, suffixes: Collection[str]) -> Iterator[LabelledMember]:
    """The pictures of a shard with their class: the sample's .cls, "label" in its .json, or the member's folder.

    Only headers and labels are read. Raises DatasetError for a damaged shard, and for a picture without a class.
    """
    damage: list[str] = []
    with shard.open("rb") as file:
        for entries in samples(file, damage):
            pictures = [one for one in entries if PurePosixPath(one.name).suffix.lower() in suffixes]
            if not pictures:
                continue
            found: dict[str, Any] = {}
            for entry in filter(describes, entries):
                if entry.size > _MOST_SAID:
                    raise _error(shard, f"{name_of(entry)} in it has {entry.size} bytes", "write the shard again")
                file.seek(entry.offset_data)
                try:
                    found |= description(entry, file.read(entry.size))
                except (ValueError, RecursionError) as error:
                    raise _error(shard, f"{name_of(entry)} in it cannot be read", "write the shard again") from error
            for one in pictures:
                yield LabelledMember(
                    shard=shard,
                    name=name_of(one),
                    label=_label(shard, one, found),
                    offset=one.offset_data,
                    size=one.size,
                    problem=problem_of(one),
                )
    if damage:
        raise _error(shard, damage[0], "fetch it again")


def _label(shard: Path, picture: tarfile.TarInfo, found: dict[str, Any]) -> str:
    label = found.get("label", os.path.dirname(name_of(picture)))  # noqa: PTH120
    if not isinstance(label, int | str) or label == "":
        what = f"{name_of(picture)} in it has no class"
        raise _error(
            shard, what, 'put a .cls beside it, a .json with "label", or the picture into a folder of its class'
        )
    return str(label)


def _error(shard: Path, what: str, fix: str) -> DatasetError:
    return DatasetError(what=what, where=str(shard), fix=fix)
