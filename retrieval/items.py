"""The items of one segment in SQLite: written once, then only read."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matvit.durable import sync_file
from matvit.metrics import IntArray
from matvit.regular import check_regular
from retrieval.errors import DamagedFileError, IndexFormatError
from retrieval.files import RESTORE, reading

Place = tuple[str, bytes]  # a root's name, and the path below it

_VERSION = 2  # of the table
_READ = range(1, _VERSION + 1)  # versions; 1 has no checksums
_AT_ONCE = 1024  # items in memory while all are read

OK = "ok"
SKIPPED = "skipped"

_SCHEMA = """
CREATE TABLE items (
    id             INTEGER PRIMARY KEY,
    root           TEXT NOT NULL,
    path           BLOB NOT NULL,
    content_sha256 TEXT NOT NULL,
    size           INTEGER NOT NULL,
    mtime_ns       INTEGER NOT NULL,
    width          INTEGER,
    height         INTEGER,
    metadata       TEXT NOT NULL DEFAULT '{}',
    status         TEXT NOT NULL CHECK (status IN ('ok', 'skipped')),
    reason         TEXT,
    row            INTEGER,
    checksum       TEXT NOT NULL,
    CHECK ((status = 'ok') = (row IS NOT NULL)),
    CHECK ((status = 'skipped') = (reason IS NOT NULL))
) STRICT
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One file that the index knows; the fields are columns of the table."""

    id: int
    root: str  # a name in the manifest's roots
    path: bytes  # relative to the root, "/" between parts
    content_sha256: str
    size: int  # bytes
    mtime_ns: int
    width: int | None  # pixels as stored, before any EXIF rotation; None when it could not be told
    height: int | None
    metadata: str = "{}"  # the user's, a JSON object
    status: str  # OK or SKIPPED
    reason: str | None  # why it was skipped
    row: int | None  # into the segment's embeddings

    @property
    def place(self) -> Place:
        """Where its file is."""
        return self.root, self.path


class Counts(NamedTuple):
    """What one segment's items are, in numbers."""

    items: int
    pictures: int  # with an embedding
    lowest: int  # id; 0 when there are none
    highest: int


class Picture(NamedTuple):
    """What searching needs of an item with an embedding."""

    place: Place
    metadata: str  # a JSON object
    content_sha256: str


# A path that holds NUL, begins with "/", or has ".." for a part; joined to a blob, "/" makes text of it.
_LEADS_OUT = (
    "instr(path, x'00') OR substr(path, 1, 1) = x'2f' OR instr(CAST('/' || path || '/' AS BLOB), CAST('/../' AS BLOB))"
)
_NAMES = tuple(field.name for field in fields(Item))
COLUMNS = ", ".join(_NAMES)
# What says nothing about the file: no memory, no more open files, no room to sort.
_NOT_NOW = {sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_FULL}
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}  # no such table: cut to nothing
_FORM = """
SELECT name, type, "notnull", pk, hidden, (SELECT strict FROM pragma_table_list WHERE name = 'items')
FROM pragma_table_xinfo('items')
"""
_values = attrgetter(*_NAMES)  # astuple would copy each value, slowly


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Make the file at `path`, synced. Raises sqlite3.Error or OSError when the disk refuses."""
    marks = ", ".join("?" * (len(_NAMES) + 1))
    rows = ((*values, _checksum(values)) for values in map(_values, items))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute(_SCHEMA)
        connection.executemany(f"INSERT INTO items ({COLUMNS}, checksum) VALUES ({marks})", rows)  # noqa: S608
    sync_file(path)


@dataclass(frozen=True, slots=True)
class ItemStore:
    """Read access to one segment's items. Its file is never written again, and open only while it is read."""

    path: Path

    def check_places(self, roots: Container[str]) -> None:
        """Raises IndexFormatError unless every item lies in one of `roots`, by a path that does not lead out of it."""
        self.check_table()
        known = all(root in roots for (root,) in self._fetch("SELECT DISTINCT root FROM items"))
        if not known or self._any(_LEADS_OUT):
            raise DamagedFileError(what="items lie outside the index's roots", where=str(self.path), fix=RESTORE)

    def check_table(self) -> None:
        """Raises IndexFormatError unless the file holds the table, with its columns, and nothing else.

        A view, or a column that is computed, is a program of the file's maker, which need not end.
        """
        [(version,)] = self._fetch("PRAGMA user_version")
        tables = self._fetch("SELECT type, name FROM sqlite_master")
        if tables != [("table", "items")] or version not in _READ or self._fetch(_FORM) != _form(version):
            raise DamagedFileError(what="is no table of items", where=str(self.path), fix=RESTORE)

    def problems(self) -> list[str]:
        """What the table's own rules leave open: one clause for each kind of thing that is wrong with some items."""
        no_sha256 = f"status = '{OK}' AND (length(content_sha256) <> 64 OR content_sha256 GLOB '*[^0-9a-f]*')"
        conditions = {"names that are empty": "length(path) = 0", "contents without a sha256": no_sha256}
        found = [what for what, condition in conditions.items() if self._any(condition)]
        with self._reading() as connection:
            texts = connection.execute("SELECT CAST(metadata AS BLOB) FROM items WHERE metadata <> '{}'")
            if not all(_is_metadata(text) for (text,) in texts):
                found.append("metadata that is no JSON object")
        if (told := self._fetch("PRAGMA quick_check(1)")) != [("ok",)]:  # types, and the conditions of the table
            found.append(f"values that the table cannot have ({told[0][0]})")
        return found

    def _any(self, condition: str) -> bool:
        return bool(self._fetch(f"SELECT 1 FROM items WHERE {condition} LIMIT 1"))  # noqa: S608

    def row_ids(self) -> IntArray:
        """(R,) int64: the item's id of every row of the embeddings. Raises IndexFormatError unless rows are 0..R-1."""
        pairs = self._fetch("SELECT row, id FROM items WHERE row IS NOT NULL ORDER BY row")
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        if not np.array_equal(table[:, 0], np.arange(len(table))):
            raise DamagedFileError(what="items and embeddings do not agree", where=str(self.path), fix=RESTORE)
        return table[:, 1].copy()

    def pictures(self) -> list[Picture]:
        """What searching needs of every row of the embeddings."""
        roots: dict[str, str] = {}  # one text for each root, not one for each row
        rows = self._fetch("SELECT root, path, metadata, content_sha256 FROM items WHERE row IS NOT NULL ORDER BY row")
        return [Picture((roots.setdefault(root, root), path), *others) for root, path, *others in rows]

    def counts(self) -> Counts:
        """How many there are, and between which ids."""
        query = f"SELECT count(*), count(*) FILTER (WHERE status = '{OK}'), min(id), max(id) FROM items"  # noqa: S608
        items, pictures, lowest, highest = self._fetch(query)[0]
        return Counts(items=items, pictures=pictures, lowest=lowest or 0, highest=highest or 0)

    def all(self) -> Iterator[Item]:
        """Every item, by id; the file is open until the last was taken."""
        with self._reading() as connection:
            rows = connection.execute(f"SELECT {COLUMNS} FROM items ORDER BY id")  # noqa: S608
            while some := rows.fetchmany(_AT_ONCE):
                yield from map(item_of, some)

    def records(self) -> Iterator[tuple[Item, bool]]:
        """Of a damaged file: every item that can be read, and whether its checksum proves that it is what was written.

        Those of version 1 have none.
        """
        with self._reading() as connection:
            connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
            [(version,)] = connection.execute("PRAGMA user_version")
            checksum = "''" if version == 1 else "checksum"
            for *values, found in connection.execute(f"SELECT {COLUMNS}, {checksum} FROM items ORDER BY id"):  # noqa: S608
                try:
                    is_sound = found == _checksum(values)
                except (AttributeError, TypeError):  # of another type than the table's
                    continue
                yield item_of(values), is_sound

    def with_ids(self, ids: Iterable[int]) -> list[Item]:
        """Those of these ids, by id."""
        query = f"SELECT {COLUMNS} FROM items WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"  # noqa: S608
        return [item_of(values) for values in self._fetch(query, json.dumps(list(ids)))]

    def skipped(self) -> list[Item]:
        """The items without an embedding, by id."""
        query = f"SELECT {COLUMNS} FROM items WHERE status = '{SKIPPED}' ORDER BY id"  # noqa: S608
        return [item_of(values) for values in self._fetch(query)]

    def _fetch(self, query: str, *values: object) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Raises IndexFormatError for what SQLite complains about while the block runs."""
        uri = self.uri()
        try:
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                yield connection
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in _NOT_NOW:
                fix = "close what else is running, make room in the temporary folder, and run the same again"
                raise IndexFormatError(what=_unread(error), where=str(self.path), fix=fix) from error
            raise DamagedFileError(what=_unread(error), where=str(self.path), fix=RESTORE) from error

    def uri(self) -> str:
        """What SQLite opens the file by. Raises IndexFormatError unless it is there."""
        # ro: a file that a writer has just removed is not made anew. immutable: no locks and no journal look-up, so
        # that read-only disks and many readers are fine.
        with reading(self.path):
            check_regular(self.path)
        return f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Raises DamagedFileError for what SQLite says of this file while it is read through another database.

        All else that it complains about may be the other's: it is left as it is.
        """
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in _DAMAGE:
                raise DamagedFileError(what=_unread(error), where=str(self.path), fix=RESTORE) from error
            raise


def _checksum(values: Sequence[Any]) -> str:
    """The first digits of the sha256 of an item's other columns: a damaged file may hold whole ones."""
    number, root, path, *others = values
    return hashlib.sha256(json.dumps([number, root, path.decode("latin-1"), *others]).encode("ascii")).hexdigest()[:16]


@cache
def _form(version: int) -> list[Any]:
    """The columns of a version's table, and that their types are enforced."""
    schema = _SCHEMA if version > 1 else _SCHEMA.replace("checksum       TEXT NOT NULL,", "")
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(schema)
        return connection.execute(_FORM).fetchall()


def _is_metadata(text: bytes) -> bool:
    found = metadata_of(text)
    try:
        return found is not None and bool(json.dumps(found, allow_nan=False))
    except (ValueError, RecursionError):  # such as 1e999
        return False


def metadata_of(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object; None where it is none that Python reads and writes."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a number of thousands of digits is one, too
        return None
    return found if isinstance(found, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN, Infinity


def _unread(error: sqlite3.Error) -> str:
    return f"the items cannot be read ({error})"


def item_of(values: Iterable[object]) -> Item:
    """The item whose COLUMNS have these values."""
    return Item(**dict(zip(_NAMES, values, strict=True)))  # type: ignore[arg-type]  # the table is STRICT
