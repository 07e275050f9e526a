"""Lists of pictures: a text file with a path on each line; CSV and Parquet with a path column and metadata columns."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import IO, Any, AnyStr, BinaryIO

from retrieval.errors import IngestError
from retrieval.locations import is_url, location, one_line, open_regular, os_reason
from retrieval.metadata import to_json
from retrieval.shards import PATH_COLUMNS, Table

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LONGEST_LINE = 2**20
_LONGEST_NUMBER = 300  # characters; Python refuses to read those of thousands
_FIX = f"give it a column '{PATH_COLUMNS[0]}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One line of a list."""

    path: str  # absolute, or a URL
    metadata: str | None  # a JSON object
    problem: str | None  # why its metadata cannot be taken
    line: int  # from 1, for messages


def is_list(name: str) -> bool:
    """Whether a file is named like a list; a Parquet file is one when it has no pictures of its own."""
    return name.lower().endswith((".txt", ".csv"))


def read_list(place: str) -> Iterator[Listed]:
    """The lines of a list; relative paths are relative to its folder. Raises IngestError, MissingExtraError."""
    read = _read_csv if place.lower().endswith(".csv") else _read_text
    try:
        yield from read(place)
    except OSError as error:
        raise IngestError(what=f"the list {_verb(error)}", where=place, fix="check the path and the disk") from error


def read_table(table: Table) -> Iterator[Listed]:
    """The same for a Parquet file that has a path column. Raises IngestError."""
    column = next((name for name in PATH_COLUMNS if name in table.columns), None)
    if column is None:
        raise IngestError(
            what="has neither a column of pictures nor one of paths",
            where=table.container,
            fix=f"{_FIX} or a column 'image' with bytes",
        )
    for number, row in enumerate(table.rows(range(table.file.num_row_groups)), start=1):
        name = row.pop(column)
        if isinstance(name, str) and name:
            yield _listed(table.container, name, row, number)


def _verb(error: OSError) -> str:
    reason = os_reason(error)
    return reason if reason.startswith(("may", "cannot")) else f"cannot be read ({reason})"


def _open(place: str) -> BinaryIO:
    """A list behind its byte order mark. Raises OSError, IngestError."""
    file = open_regular(place)
    head = file.read(len(codecs.BOM_UTF8))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        file.close()
        raise IngestError(what="the list is UTF-16", where=place, fix="save it as UTF-8")
    file.seek(len(head) if head == codecs.BOM_UTF8 else 0)
    return file


def _lines(file: IO[AnyStr], place: str) -> Iterator[AnyStr]:
    """Raises IngestError for a line that would take all memory."""
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise IngestError(
                what=f"line {number} is longer than {_LONGEST_LINE:,} characters", where=place, fix="it is no list"
            )
        yield line


def _read_text(place: str) -> Iterator[Listed]:
    with _open(place) as file:
        for number, line in enumerate(_lines(file, place), start=1):
            name = os.fsdecode(line.rstrip(b"\r\n"))
            if name:
                yield _listed(place, name, {}, number)


def _read_csv(place: str) -> Iterator[Listed]:
    numeric = _numeric_columns(place)
    for number, row in _csv_rows(place):
        name = row.pop(_path_column(row, place), "")
        if not all(map(_is_text, row.values())):  # a path may be any bytes
            raise IngestError(what=f"line {number} is no UTF-8", where=place, fix="save the list as UTF-8")
        values = {key: _value(cell, numeric=key in numeric) if cell else None for key, cell in row.items()}
        if name:
            yield _listed(place, name, values, number)


def _is_text(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _value(cell: str, *, numeric: bool) -> str | int | float:
    if not (numeric and _is_number(cell)):  # asked again: the list may have grown since
        return cell
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


def _numeric_columns(place: str) -> set[str]:
    """Columns whose every cell is a number, so that ranges can be asked for; "007" is none."""
    numeric: set[str] | None = None
    for _, row in _csv_rows(place):
        numeric = set(row) if numeric is None else numeric
        numeric -= {name for name in numeric if row[name] and not _is_number(row[name])}
    return numeric or set()


def _is_number(cell: str) -> bool:
    return len(cell) < _LONGEST_NUMBER and _NUMBER.fullmatch(cell) is not None and isfinite(float(cell))


def _csv_rows(place: str) -> Iterator[tuple[int, dict[str, str]]]:
    with io.TextIOWrapper(
        _open(place),
        encoding="utf-8",
        errors="surrogateescape",
        newline="",
    ) as text:
        reader = csv.DictReader(
            _lines(text, place), restval="", strict=True
        )  # or an unclosed quote would take all lines after it
        read = 0  # lines of whole rows
        try:
            _refuse_repeated(reader.fieldnames or (), place)
            read = reader.line_num
            for row in reader:
                read = reader.line_num
                if None in row:
                    raise IngestError(
                        what=f"line {reader.line_num} has more cells than the first line",
                        where=place,
                        fix="quote cells that hold commas",
                    )
                yield reader.line_num, row
        except csv.Error as error:
            if "field limit" in str(error):
                raise IngestError(
                    what=f"line {reader.line_num + 1} has a cell of more than {csv.field_size_limit():,} characters",
                    where=place,
                    fix="shorten it, or leave its column out",
                ) from error
            raise IngestError(
                what=f"what begins in line {read + 1} is no CSV ({error})",
                where=place,
                fix="write it as comma-separated text, and close every quote",
            ) from error
        if reader.fieldnames is not None:
            _path_column(dict.fromkeys(reader.fieldnames, ""), place)  # also when there is no other line


def _refuse_repeated(columns: Sequence[str], place: str) -> None:
    for name, count in Counter(columns).items():
        if name and count > 1:
            raise IngestError(
                what=f"{count} columns are named '{one_line(name)}'", where=place, fix="rename or leave out all but one"
            )


def _path_column(row: Mapping[str, str], place: str) -> str:
    for name in PATH_COLUMNS:
        if name in row:
            return name
    columns = one_line(", ".join(row))
    fix = "separate its columns by commas" if len(row) == 1 and re.search("[;\t|]", columns) else _FIX
    raise IngestError(what=f"the list has no path column, only: {columns}", where=place, fix=fix)


def _listed(place: str, name: str, values: Mapping[str, Any], line: int) -> Listed:
    metadata, problem = to_json(values)
    return Listed(path=_resolved(place, name), metadata=metadata, problem=problem, line=line)


def _resolved(place: str, name: str) -> str:
    if is_url(name):
        return location(name)
    if is_url(place):
        return f"{place.rpartition('/')[0]}/{name}"
    return os.path.abspath(os.path.join(os.path.dirname(place), name))  # noqa: PTH100, PTH118, PTH120
