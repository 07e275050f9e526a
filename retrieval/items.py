"""The items of one segment in SQLite: written once, then only read."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from matvit.durable import sync_file
from retrieval.errors import IndexFormatError
from retrieval.files import RESTORE

IntArray = npt.NDArray[np.int64]

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
    metadata       TEXT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('ok', 'skipped')),
    reason         TEXT,
    row            INTEGER,
    CHECK ((status = 'ok') = (row IS NOT NULL)),
    CHECK ((status = 'skipped') = (reason IS NOT NULL))
) STRICT
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One file that the index knows; the fields are the table's columns, in its order."""

    id: int
    root: str  # a name in the manifest's roots
    path: bytes  # relative to the root, "/" between parts
    content_sha256: str
    size: int  # bytes
    mtime_ns: int
    width: int | None  # pixels as stored, before any EXIF rotation; None when it could not be told
    height: int | None
    metadata: str  # a JSON object
    status: str  # OK or SKIPPED
    reason: str | None  # why it was skipped
    row: int | None  # into the segment's embeddings


_COLUMNS = ", ".join(field.name for field in fields(Item))


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Make the file at `path`, synced. Raises sqlite3.Error or OSError when the disk refuses."""
    marks = ", ".join("?" * len(fields(Item)))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA user_version = 1")
        connection.execute(_SCHEMA)
        connection.executemany(f"INSERT INTO items ({_COLUMNS}) VALUES ({marks})", map(astuple, items))  # noqa: S608
    sync_file(path)


class ItemStore:
    """Read access to one segment's items, from any thread. Its file is never written again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # immutable: no locks and no journal look-up, so that read-only disks and many readers are fine.
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False)
        self._lock = threading.Lock()
        weakref.finalize(self, self._connection.close)

    def row_ids(self) -> IntArray:
        """(R,) int64: the item's id of every row of the embeddings. Raises IndexFormatError unless rows are 0..R-1."""
        pairs = self._fetch("SELECT row, id FROM items WHERE row IS NOT NULL ORDER BY row")
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        if not np.array_equal(table[:, 0], np.arange(len(table))):
            raise IndexFormatError(what="items and embeddings do not agree", where=str(self._path), fix=RESTORE)
        return table[:, 1].copy()

    def all(self) -> Iterator[Item]:
        """Every item, by id."""
        for values in self._fetch(f"SELECT {_COLUMNS} FROM items ORDER BY id"):  # noqa: S608
            yield _item(values)

    def lookup(self, ids: Sequence[int]) -> dict[int, Item]:
        """The items of these ids; unknown ids are left out."""
        found: dict[int, Item] = {}
        for start in range(0, len(ids), 500):  # SQLite limits the parameters of one statement
            part = ids[start : start + 500]
            marks = ", ".join("?" * len(part))
            rows = self._fetch(f"SELECT {_COLUMNS} FROM items WHERE id IN ({marks})", part)  # noqa: S608
            found.update((item.id, item) for item in map(_item, rows))
        return found

    def _fetch(self, query: str, values: Sequence[int] = ()) -> list[tuple[object, ...]]:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise IndexFormatError(
                what=f"the items cannot be read ({error})", where=str(self._path), fix=RESTORE
            ) from error


def _item(values: tuple[object, ...]) -> Item:
    named = dict(zip((field.name for field in fields(Item)), values, strict=True))
    return Item(**named)  # type: ignore[arg-type]  # the table is STRICT: its columns have these types
