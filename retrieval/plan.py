"""What was found, compared with what the index has: the pictures that must be read, and those that need not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matvit.errors import MissingExtraError
from matvit.preprocess import MAX_FILE_BYTES, TOO_LARGE
from retrieval.errors import IngestError
from retrieval.found_files import PICTURE, TABLE, TAR, FoundFile, FoundFiles
from retrieval.known import Known, KnownItems
from retrieval.loading import Task
from retrieval.locations import Open, Status, is_url, open_with_status, os_reason, status_of
from retrieval.presence import is_unchanged
from retrieval.roots import Roots
from retrieval.shards import Member, ShardError, Table, is_table, tar_members
from retrieval.sources import is_gone
from retrieval.types import SkippedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """A picture that need not be read."""

    full_path: str  # its location, for messages
    known: Known
    metadata: str | None  # a JSON object that may be new; None: nothing was said


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A picture that is there but cannot be read now: the index keeps the reason, and the next run tries again."""

    full_path: str  # its location
    reason: str


Step = Task | Unchanged | Unread | SkippedFile  # the last: not there, a shard, or without a place of its own


class Plan:
    """The steps of one run, in the order in which the files were found; shards are opened when they are reached."""

    def __init__(self, found: FoundFiles, *, known: KnownItems, roots: Roots) -> None:
        self._found = found
        self._known = known
        self._roots = roots

    def __iter__(self) -> Iterator[Step]:
        for file in self._found.files():
            try:
                status = file.status or status_of(file.path)
            except (OSError, IngestError, MissingExtraError) as error:  # a list may name stores that are not known here
                is_picture = file.kind == PICTURE and isinstance(error, OSError) and not is_gone(error)
                yield (_unread if is_picture else _skip)(file.path, os_reason(error))
                continue
            if not status.regular:
                yield (_unread if file.kind == PICTURE else _skip)(file.path, "not a regular file")
            elif file.kind in {TAR, TABLE}:
                yield from self._members(file.path, status, kind=file.kind)
            else:
                yield self._file(file, status)

    def _file(self, file: FoundFile, status: Status) -> Step:
        if file.problem is not None:
            return _unread(file.path, file.problem)
        remote = is_url(file.path)
        return self._compare(
            file.path,
            size=status.size,
            status=status,
            metadata=file.metadata,
            source=partial(open_with_status, file.path, status if remote else None),
            is_file=not remote,
        )

    def _members(self, container: str, status: Status, *, kind: str) -> Iterator[Step]:
        """The pictures of a shard or table; where it is damaged, those before that."""
        empty = True
        try:
            for step in self._rows(container, status) if kind == TABLE else self._of_tar(container, status):
                empty = False
                yield step
            if empty:
                yield _skip(container, "holds no pictures")
        except ShardError as error:
            yield _skip(container, error.reason)
        except OSError as error:
            yield _skip(container, os_reason(error))

    def _of_tar(self, container: str, status: Status) -> Iterator[Step]:
        return (self._member(container, member, status) for member in tar_members(container))

    def _rows(self, container: str, status: Status) -> Iterator[Step]:
        """The rows of those row groups that hold something new are read; the others need not be."""
        table = Table(container)
        try:
            for number, rows in enumerate(table.groups()):
                same = list(self._unchanged_rows(container, rows, status))
                if len(same) == len(rows):
                    yield from same
                    continue
                read = 0
                for read, member in enumerate(table.members(number, rows.start), start=1):  # noqa: B007
                    yield self._member(container, member, status)
                if read < len(rows):
                    raise ShardError("damaged parquet file (rows are missing)")
        finally:
            table.close()

    def _unchanged_rows(self, container: str, rows: range, status: Status) -> Iterator[Unchanged]:
        """Up to the first that must be read: a damaged table may claim any number."""
        for row in rows:
            full_path = f"{container}#{row}"
            known = self._known.at(*self._roots.locate(full_path))
            if known is None or not is_unchanged(known.item, status):
                return
            yield Unchanged(full_path=full_path, known=known, metadata=None)

    def _member(self, container: str, member: Member, status: Status) -> Step:
        full_path = f"{container}#{member.name}"
        if not is_url(container) and os.path.lexists(full_path):
            return _skip(full_path, "a file beside the shard has this very name")
        if member.problem is not None:
            # A tar's may have no name of its own, or none that an index can hold.
            return (_unread if is_table(container) else _skip)(full_path, member.problem)
        return self._compare(
            full_path,
            size=member.size,
            status=status,
            metadata=member.metadata,
            source=lambda: (member.open(container), status),
        )

    def _compare(
        self,
        full_path: str,
        *,
        size: int,
        status: Status,
        metadata: str | None,
        source: Open,
        is_file: bool = False,
    ) -> Step:
        root, path = self._roots.locate(full_path)
        known = self._known.at(root, path)
        if size > MAX_FILE_BYTES:
            return _unread(full_path, TOO_LARGE)
        if known and is_unchanged(known.item, status):
            return Unchanged(full_path=full_path, known=known, metadata=metadata)
        return Task(
            full_path=full_path,
            root=root,
            path=path,
            known=known,
            open=source,
            is_file=is_file,
            metadata=metadata,
        )


def _unread(path: str, reason: str) -> Unread:
    return Unread(full_path=path, reason=reason)


def _skip(path: str, reason: str) -> SkippedFile:
    return SkippedFile(path=Path(path), reason=reason)
