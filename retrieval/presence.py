"""Whether the file of an item is still there, and still the same."""

from __future__ import annotations

from matvit.errors import MatVitError
from retrieval.found_files import FoundFiles
from retrieval.items import Item
from retrieval.locations import NO_TIME, Status, is_url, split_member, status_of
from retrieval.shards import Table, is_row, is_table, tar_members
from retrieval.sources import is_gone, lstat_error


class Presence:
    """Whether the picture of an item is still there: asks the disk, not what was found by its name."""

    def __init__(self, found: FoundFiles) -> None:
        self._found = found
        # Of the shard that was asked for last:
        self._status: tuple[str, Status] = "", Status(size=0, mtime_ns=NO_TIME)
        self._members: tuple[str, frozenset[str] | int] = "", 0

    def __call__(self, path: str, item: Item) -> bool:
        """`path`: the item's location."""
        container, member = split_member(path)
        if is_url(container):
            is_there = self._found.holds(container) or not _is_gone_from_store(container)
            return is_there and (member is None or self._holds(container, member, item))
        error = lstat_error(container)
        if error is not None or member is None:
            return not is_gone(error)
        return self._holds(container, member, item)

    def holds_nothing(self, container: str) -> bool:
        """Whether a shard or table that is there has no pictures at all: what was in it may have been cut off."""
        try:
            return not self._names(container)
        except OSError:
            return False

    def _holds(self, container: str, member: str, item: Item) -> bool:
        try:
            if self._status[0] != container:
                self._status = container, status_of(container)
            if is_unchanged(item, self._status[1]):
                return True
            names = self._names(container)
        except OSError:  # says nothing about what was in it
            return True
        return is_row(member, names) if isinstance(names, int) else member in names

    def _names(self, container: str) -> frozenset[str] | int:
        if self._members[0] != container:
            self._members = container, _names(container)
        return self._members[1]


def _is_gone_from_store(url: str) -> bool:
    """Asks the store: a pattern, or a listing that failed somewhere, finds only some of what is there."""
    try:
        status_of(url)
    except (OSError, MatVitError) as error:
        return isinstance(error, FileNotFoundError)
    return False


def is_unchanged(item: Item, status: Status) -> bool:
    """Whether its file, or the file that holds it, has the size and time that it was indexed with."""
    return status.mtime_ns != NO_TIME and (item.size, item.mtime_ns) == (status.size, status.mtime_ns)


def _names(container: str) -> frozenset[str] | int:
    """The members of a tar shard, or the number of rows of a table. Raises OSError."""
    if not is_table(container):
        return frozenset(member.name for member in tar_members(container))
    table = Table(container)
    try:
        return len(table)
    finally:
        table.close()
