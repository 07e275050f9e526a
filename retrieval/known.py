"""The items that an index already has, looked up by place and by content, in bounded memory."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields

from retrieval.items import OK, Item
from retrieval.manifest import ITEMS
from retrieval.snapshot import OpenSegment, Snapshot

_COLUMNS = ", ".join(field.name for field in fields(Item))


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An item that the index already has, and where."""

    item: Item
    segment: OpenSegment


class KnownItems:
    """Every item of one generation that counts. Safe from any thread.

    Kept in a private database of SQLite's, which goes to the disk when it is large: a million items as objects
    would take a gigabyte.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Raises sqlite3.Error when the disk refuses; the segments were checked when the snapshot was opened."""
        self._segments = {segment.entry.name: segment for segment in snapshot.segments}
        self._connection = sqlite3.connect("", uri=True, isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._lock = threading.Lock()
        self._fill()

    def _fill(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode = OFF")
        run(f"CREATE TABLE known (segment TEXT, {_COLUMNS})")
        run("CREATE TABLE gone (id INTEGER PRIMARY KEY)")
        for name, segment in self._segments.items():
            uri = f"{(segment.folder / ITEMS).absolute().as_uri()}?immutable=1"
            run("ATTACH ? AS one", (uri,))
            run("BEGIN")
            run("DELETE FROM gone")
            self._connection.executemany(
                "INSERT INTO gone VALUES (?)", ((number,) for number in segment.deleted.tolist())
            )
            columns = f"?, {_COLUMNS}"
            run(f"INSERT INTO known SELECT {columns} FROM one.items WHERE id NOT IN gone", (name,))  # noqa: S608
            run("COMMIT")
            run("DETACH one")
        run("CREATE INDEX by_place ON known (root, path)")
        run(f"CREATE INDEX by_content ON known (content_sha256) WHERE status = '{OK}'")

    def at(self, root: str, path: bytes) -> Known | None:
        """The item at a place."""
        return self._one("root = ? AND path = ?", root, path)

    def with_content(self, content_sha256: str) -> Known | None:
        """A picture with this content, the first by id."""
        return self._one(f"status = '{OK}' AND content_sha256 = ? ORDER BY id", content_sha256)

    def all(self) -> Iterator[Known]:
        """Every item, by place; in pieces, so that others may ask meanwhile."""
        last = "", b""
        while rows := self._rows("(root, path) > (?, ?) ORDER BY root, path LIMIT 1000", *last):
            yield from map(self._known, rows)
            last = rows[-1][2], rows[-1][3]

    def _one(self, condition: str, *values: object) -> Known | None:
        rows = self._rows(f"{condition} LIMIT 1", *values)
        return self._known(rows[0]) if rows else None

    def _rows(self, condition: str, *values: object) -> list[tuple[str, int, str, bytes]]:
        with self._lock:
            query = f"SELECT segment, {_COLUMNS} FROM known WHERE {condition}"  # noqa: S608
            return self._connection.execute(query, values).fetchall()

    def _known(self, row: tuple[object, ...]) -> Known:
        named = dict(zip((field.name for field in fields(Item)), row[1:], strict=True))
        return Known(item=Item(**named), segment=self._segments[str(row[0])])  # type: ignore[arg-type]
