"""The items that an index already has, looked up by place and by content, in bounded memory."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from retrieval.items import COLUMNS, OK, Item, item_of
from retrieval.manifest import ITEMS
from retrieval.snapshot import OpenSegment, Snapshot


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
        self._roots = snapshot.manifest.roots
        self._segments = {segment.entry.name: segment for segment in snapshot.segments}
        self._connection = sqlite3.connect("", uri=True, isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._lock = threading.Lock()
        self._fill()

    def _fill(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode = OFF")
        run(f"CREATE TABLE known (segment TEXT, {COLUMNS})")
        run("CREATE TABLE gone (id INTEGER PRIMARY KEY)")
        for name, segment in self._segments.items():
            uri = f"{(segment.folder / ITEMS).absolute().as_uri()}?immutable=1"
            run("ATTACH ? AS one", (uri,))
            run("BEGIN")
            run("DELETE FROM gone")
            self._connection.executemany(
                "INSERT INTO gone VALUES (?)", ((number,) for number in segment.deleted.tolist())
            )
            columns = f"?, {COLUMNS}"
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

    def at_or_below(self, place: str) -> Iterator[Known]:
        """The items at an absolute place, inside it when it is a shard, or below it when it is a folder."""
        inside = os.path.join(place, "")  # noqa: PTH118 - as text, like `is_below`
        for name, folder in self._roots.items():
            root = os.path.join(folder, "")  # noqa: PTH118
            if root.startswith(inside):
                yield from self._between(name, b"", None)
            elif inside.startswith(root):
                path = os.fsencode(inside[len(root) : -1].replace(os.sep, "/"))
                for first, end in ((b"", b"\0"), (b"#", b"$"), (b"/", b"0")):  # each of these, and what begins with it
                    yield from self._between(name, path + first, path + end)

    def _between(self, root: str, first: bytes, end: bytes | None) -> Iterator[Known]:
        """Items by path, from `first` to before `end`; in pieces, so that others may ask meanwhile."""
        condition = "root = ? AND path >= ?" + ("" if end is None else " AND path < ?") + " ORDER BY path LIMIT 1000"
        while rows := self._rows(condition, root, first, *(() if end is None else (end,))):
            yield from map(self._known, rows)
            first = rows[-1][3] + b"\0"  # the next path that there could be

    def _one(self, condition: str, *values: object) -> Known | None:
        rows = self._rows(f"{condition} LIMIT 1", *values)
        return self._known(rows[0]) if rows else None

    def _rows(self, condition: str, *values: object) -> list[tuple[str, int, str, bytes]]:
        with self._lock:
            query = f"SELECT segment, {COLUMNS} FROM known WHERE {condition}"  # noqa: S608
            return self._connection.execute(query, values).fetchall()

    def _known(self, row: tuple[object, ...]) -> Known:
        return Known(item=item_of(row[1:]), segment=self._segments[str(row[0])])
