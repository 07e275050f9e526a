"""Pictures inside files: tar shards in webdataset's layout, and Parquet tables with a column of pictures."""

from __future__ import annotations

import errno
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, BinaryIO

from matvit import tars
from matvit.datasets import PICTURE_SUFFIXES, schema_names
from matvit.errors import MissingExtraError
from matvit.preprocess import MAX_FILE_BYTES
from retrieval.locations import (
    NO_MEMBER,
    NO_ROW,
    NO_TIME,
    Status,
    one_line,
    open_file,
    open_regular,
    status_of,
    too_large,
    window,
)
from retrieval.metadata import MAX_METADATA, to_json

PATH_COLUMNS = ("path", "file_name", "filename")  # the first that a table has; Hugging Face's name is the second
_ROWS = 64  # of a table, read together ...
_BYTES = 2**24  # ... while they take no more than about this
_LONGEST_ROW = 19  # digits; Python refuses to read thousands


class ShardError(OSError):
    """A shard or table that cannot be read (further); the text is the short reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One picture inside a file."""

    name: str  # what follows "#" in its location
    metadata: str | None = None  # a JSON object
    offset: int = 0  # of its bytes, in a tar
    size: int = 0
    data: bytes | None = None  # in a table
    problem: str | None = None  # why it cannot be taken

    def open(self, container: str) -> BinaryIO:
        """Its bytes as a file. Raises OSError."""
        if self.data is not None:
            return io.BytesIO(self.data)
        return window(open_file(container), offset=self.offset, size=self.size)


def is_tar(name: str) -> bool:
    """Whether a file is named like a tar shard."""
    return name.lower().endswith(".tar")


def is_table(name: str) -> bool:
    """Whether a file is named like a Parquet table."""
    return name.lower().endswith(".parquet")


def holds_members(name: str) -> bool:
    """Whether a file is named like either, so that "#" behind it begins a place inside."""
    return is_tar(name) or is_table(name)


def is_row(name: str, rows: int) -> bool:
    """Whether the place inside a table is one of its first `rows` rows."""
    return name.isdecimal() and len(name) < _LONGEST_ROW and int(name) < rows


def read_member(container: str, name: str) -> bytes:
    """The bytes of one picture inside a file. Raises OSError."""
    if is_table(container):
        with closing(RowReader()) as rows:
            return rows.read(container, name)[0]
    status = status_of(container)
    place = _offsets(container, status.size, status.mtime_ns).get(name)
    if place is None:
        raise FileNotFoundError(2, NO_MEMBER, f"{container}#{name}")
    if place[1] > MAX_FILE_BYTES:
        raise too_large()
    with Member(name=name, offset=place[0], size=place[1]).open(container) as file:
        return file.read()


@lru_cache(maxsize=4)
def _offsets(container: str, size: int, mtime_ns: int) -> dict[str, tuple[int, int]]:  # noqa: ARG001 (a changed file is read anew)
    with open_regular(container) as file:
        files = (entry for entry in tars.headers(file, []) if tars.problem_of(entry) is None)
        return {tars.name_of(entry): (entry.offset_data, entry.size) for entry in files}


# --- tar shards ----------------------------------------------------------------------------------


def tar_members(container: str) -> Iterator[Member]:
    """The pictures of a tar shard with the metadata of their sample: members whose names agree up to the first dot.

    Only headers and metadata are read. Raises ShardError where the shard is damaged, after what comes before that.
    """
    seen: set[str] = set()
    damage: list[str] = []  # an error at once would take the group before with it
    with open_regular(container) as file:
        for entries in tars.samples(file, damage):
            metadata, problem = _group_metadata(entries, file)
            for entry in entries:
                name = tars.name_of(entry)
                if os.path.splitext(name)[1].lower() not in PICTURE_SUFFIXES:  # noqa: PTH122
                    continue
                twice = "the shard has two members of this name" if name in seen else None
                leads_out = "its name leads out of the shard" if ".." in name.split("/") or "\0" in name else None
                seen.add(name)
                yield Member(
                    name=name,
                    metadata=metadata,
                    offset=entry.offset_data,
                    size=entry.size,
                    problem=leads_out or twice or tars.problem_of(entry) or problem,
                )
    if damage:
        raise ShardError(one_line(damage[0]))


def _group_metadata(entries: Sequence[tarfile.TarInfo], file: BinaryIO) -> tuple[str | None, str | None]:
    """The group's metadata, and what is wrong with it."""
    found: dict[str, Any] = {}
    for entry in filter(tars.describes, entries):
        if entry.size > MAX_METADATA:
            return None, f"its metadata in {tars.name_of(entry)} has more than {MAX_METADATA // 1024} KiB"
        file.seek(entry.offset_data)
        try:
            found |= tars.description(entry, file.read(entry.size))
        except (ValueError, RecursionError):
            return None, f"its metadata in {one_line(tars.name_of(entry))} cannot be read"
    return to_json(found)


# --- Parquet tables --------------------------------------------------------------------------------


@dataclass(slots=True)
class Table:
    """An open Parquet file. Raises ShardError whenever it cannot be read, MissingExtraError without pyarrow."""

    container: str
    file: Any = field(init=False)  # pyarrow.parquet.ParquetFile

    def __post_init__(self) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError.for_extra("parquet", purpose=f"reading {self.container}") from error
        source = open_regular(self.container)
        try:
            self.file = pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
        except Exception as error:  # pyarrow raises nearly anything on damaged bytes
            source.close()
            raise ShardError(f"is no readable parquet file ({one_line(str(error))})") from error

    @property
    def image_column(self) -> str | None:
        """The column with pictures: a structure with bytes, as Hugging Face has it, or bytes themselves.

        Of several the one named "image", else the first structure. Bytes beside a column of paths are none: hashes.
        """
        import pyarrow as pa

        def holds_bytes(kind: Any) -> bool:
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        columns = {str(column.name): column.type for column in self.file.schema_arrow}
        structures = [
            name
            for name, kind in columns.items()
            if pa.types.is_struct(kind) and any(inner.name == "bytes" and holds_bytes(inner.type) for inner in kind)
        ]
        has_paths = not columns.keys().isdisjoint(PATH_COLUMNS)
        plain = [name for name, kind in columns.items() if holds_bytes(kind) and (name == "image" or not has_paths)]
        found = sorted([*structures, *plain], key=lambda name: name != "image")
        return found[0] if found else None

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return [str(name) for name in self.file.schema_arrow.names]

    def __len__(self) -> int:
        return int(self.file.metadata.num_rows)

    def groups(self) -> list[range]:
        """Row numbers of each row group: what is read at once."""
        sizes = [self.file.metadata.row_group(number).num_rows for number in range(self.file.num_row_groups)]
        return [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def rows(self, groups: Sequence[int], *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of these row groups, of all columns or of these."""
        try:
            together = min(map(self._rows_together, groups), default=_ROWS)
            for batch in self.file.iter_batches(batch_size=together, row_groups=list(groups), columns=columns):
                yield from _plain(batch)
        except MemoryError as error:  # pyarrow's is one
            raise ShardError("its rows take more memory than there is") from error
        except Exception as error:
            raise ShardError(f"damaged parquet file ({one_line(str(error))})") from error

    def _rows_together(self, group: int) -> int:
        found = self.file.metadata.row_group(group)
        row = found.total_byte_size / max(1, found.num_rows)
        return int(min(_ROWS, max(1, _BYTES // max(1, row))))

    def members(self, group: int, first: int) -> Iterator[Member]:
        """The pictures of one row group, whose first row is `first`."""
        column, classes = self.image_column, schema_names(self.file.schema_arrow)
        assert column is not None
        for number, row in enumerate(self.rows([group]), start=first):
            image = row.pop(column)
            data = image.get("bytes") if isinstance(image, dict) else image
            label = row.get("label")
            if isinstance(label, int) and 0 <= label < len(classes):
                row["label"] = classes[label]
            metadata, problem = to_json(row)
            problem = problem or (None if data else "the row holds no bytes of a picture")
            yield Member(name=str(number), metadata=metadata, data=data or b"", problem=problem)

    def close(self) -> None:
        """Close the file."""
        self.file.close(force=True)


def _plain(batch: Any) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (OverflowError, ValueError):  # one date or time that Python has no number for
        columns = [[_cell(value) for value in column] for column in batch.columns]
        rows = [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        return None


class RowReader:
    """Pictures in rows of Parquet tables; in the tables' order, each row is decoded once, in little memory."""

    def __init__(self) -> None:
        self._table: Table | None = None
        self._status = Status(size=0, mtime_ns=NO_TIME)
        self._ahead = range(0)  # the rows of the row group that are still to come
        self._rows: Iterator[dict[str, Any]] = iter(())

    def read(self, container: str, name: str) -> tuple[bytes, Status]:
        """The bytes of one picture, with the status that its table had when it was opened. Raises OSError."""
        row = int(name) if is_row(name, sys.maxsize) else -1
        if self._table is None or self._table.container != container:
            self.close()
            self._status = status_of(container)
            if not self._status.regular:  # opening a pipe would wait for ever
                raise OSError(errno.EINVAL, "not a regular file")
            self._table = Table(container)
        column = self._table.image_column
        if column is None:
            raise FileNotFoundError(2, NO_ROW, f"{container}#{name}")
        if row not in self._ahead:
            self._seek(self._table, row, column)
        ahead, self._ahead = self._ahead, range(0)  # where reading fails the next one seeks, and is told why
        for number, found in zip(ahead, self._rows, strict=False):
            if number == row:
                self._ahead = range(row + 1, ahead.stop)
                image = found[column]
                data = image.get("bytes") if isinstance(image, dict) else image
                if data:
                    return bytes(data), self._status
                break
        raise FileNotFoundError(2, NO_ROW, f"{container}#{name}")

    def _seek(self, table: Table, row: int, column: str) -> None:
        groups = enumerate(table.groups())
        number, self._ahead = next(((number, rows) for number, rows in groups if row in rows), (None, range(0)))
        self._rows = iter(()) if number is None else table.rows([number], columns=[column])

    def close(self) -> None:
        """Close the table that is open."""
        if self._table is not None:
            self._table.close()
        self._table, self._ahead = None, range(0)
