"""The items that an index already has, looked up by place and by content, in bounded memory."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from retrieval.items import COLUMNS, OK, Item, item_of
from retrieval.shards import holds_members
from retrieval.snapshot import OpenSegment, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An item that the index already has, and where."""

    item: Item
    segment: OpenSegment


Area = tuple[str, bytes, bytes]  # a root's name; paths below it from the one to before the other

_END = b"\xff" * 5000  # after every path: none is as long
_PAGE = 1000  # items that are read together
_ENDING = 16  # digits of a content's sha256 that are looked up; then all are compared
_AREAS = "CREATE TABLE areas (root TEXT, first BLOB, past BLOB, PRIMARY KEY (root, first)) WITHOUT ROWID"
_KNOWN = f"CREATE TABLE known (segment TEXT, {COLUMNS})"
_IN_AREAS = """
path < (SELECT past FROM areas WHERE areas.root = items.root AND first <= items.path ORDER BY first DESC LIMIT 1)
"""


class KnownItems:
    """Those of one generation that count. Safe from any thread.

    What lies at the places that are asked for is copied into a private database of SQLite's, which goes to the disk
    when it is large: a million items as objects would take a gigabyte, and one picture more need not copy a million.
    """

    def __init__(self, snapshot: Snapshot, places: Iterable[str]) -> None:
        """`places`: absolute; only what lies at them, in them or below them is found `at` a place, or `at_or_below`.

        Raises sqlite3.Error when the disk refuses, IndexFormatError for a segment that was whole when the snapshot
        was opened, and is no more.
        """
        self._roots: dict[str, list[str]] = {}  # names by folder, with a separator at its end
        for name, folder in snapshot.manifest.roots.items():
            self._roots.setdefault(os.path.join(folder, ""), []).append(name)  # noqa: PTH118 - as text, like `is_below`
        self._folders = sorted(self._roots)
        self._segments = {segment.entry.name: segment for segment in snapshot.segments}
        self._connection = sqlite3.connect("", uri=True, isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._lock = threading.Lock()
        self._has_contents = False
        for line in ("PRAGMA journal_mode = OFF", "CREATE TABLE gone (id INTEGER PRIMARY KEY)", _AREAS, _KNOWN):
            self._connection.execute(line)
        areas = _without_overlaps(area for place in places for area in self._areas(place))
        self._connection.executemany("INSERT INTO areas VALUES (?, ?, ?)", areas)
        self._copy(f"INSERT INTO known SELECT ?, {COLUMNS} FROM one.items WHERE {_IN_AREAS}")  # noqa: S608
        self._connection.execute("CREATE INDEX by_place ON known (root, path)")

    def at(self, root: str, path: bytes) -> Known | None:
        """The item at a place."""
        if not self._segments:
            return None
        rows = self._rows("root = ? AND path = ? LIMIT 1", root, path)
        return self._known(rows[0]) if rows else None

    def with_content(self, content_sha256: str) -> Known | None:
        """A picture with this content, the first by id."""
        if not self._segments:
            return None
        with self._lock:
            if not self._has_contents:
                self._connection.execute("CREATE TABLE contents (ending TEXT, id INTEGER, segment TEXT)")
                columns = f"substr(content_sha256, -{_ENDING}), id, ?"
                self._copy(f"INSERT INTO contents SELECT {columns} FROM one.items WHERE status = '{OK}'")  # noqa: S608
                self._connection.execute("CREATE INDEX by_content ON contents (ending)")
                self._has_contents = True
            query = "SELECT id, segment FROM contents WHERE ending = ? ORDER BY id"
            found = self._connection.execute(query, (content_sha256[-_ENDING:],)).fetchall()
        for number, name in found:
            [item] = self._segments[name].items.with_ids([number])
            if item.content_sha256 == content_sha256:
                return Known(item=item, segment=self._segments[name])
        return None

    def at_or_below(self, place: str) -> Iterator[Known]:
        """The items at an absolute place, inside it when it is a shard, or below it when it is a folder."""
        for area in self._areas(place):
            yield from self._between(*area)

    def _areas(self, place: str) -> Iterator[Area]:
        inside = os.path.join(place, "")  # noqa: PTH118
        for number in range(bisect_left(self._folders, inside), len(self._folders)):
            if not self._folders[number].startswith(inside):
                break
            yield from ((name, b"", _END) for name in self._roots[self._folders[number]])
        for length in (end for end, letter in enumerate(inside[:-1], start=1) if letter == os.sep):
            path = os.fsencode(inside[length:-1].replace(os.sep, "/"))
            inner = [(b"#", b"$")] if holds_members(place) else []
            for first, end in ((b"", b"\0"), (b"/", b"0"), *inner):  # each of these, and what begins with it
                yield from ((name, path + first, path + end) for name in self._roots.get(inside[:length], ()))

    def _between(self, root: str, first: bytes, end: bytes) -> Iterator[Known]:
        """Items by path, from `first` to before `end`; in pieces, so that others may ask meanwhile."""
        while rows := self._rows("root = ? AND path >= ? AND path < ? ORDER BY path LIMIT ?", root, first, end, _PAGE):
            yield from map(self._known, rows)
            first = rows[-1][3] + b"\0"  # the next path that there could be

    def _copy(self, insert: str) -> None:
        """Run `insert` for each segment, attached as `one`, whose name is its parameter, but for what is deleted."""
        run = self._connection.execute
        for name, segment in self._segments.items():
            with segment.items.attached():
                run("ATTACH ? AS one", (segment.items.uri(),))
                run("BEGIN")
                run("DELETE FROM gone")
                self._connection.executemany(
                    "INSERT INTO gone VALUES (?)", ((number,) for number in segment.deleted.tolist())
                )
                run(f"{insert} AND id NOT IN gone", (name,))
                run("COMMIT")
                run("DETACH one")

    def _rows(self, condition: str, *values: object) -> list[tuple[str, int, str, bytes]]:
        with self._lock:
            query = f"SELECT segment, {COLUMNS} FROM known WHERE {condition}"  # noqa: S608
            return self._connection.execute(query, values).fetchall()

    def _known(self, row: tuple[object, ...]) -> Known:
        return Known(item=item_of(row[1:]), segment=self._segments[str(row[0])])


def _without_overlaps(areas: Iterable[Area]) -> Iterator[Area]:
    """The same paths, each in one area only."""
    last: Area | None = None
    for root, first, end in sorted(areas):
        if last is not None and root == last[0] and first <= last[2]:
            last = root, last[1], max(end, last[2])
            continue
        if last is not None:
            yield last
        last = root, first, end
    if last is not None:
        yield last
