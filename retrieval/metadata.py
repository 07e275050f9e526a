"""What a user says of pictures, as a JSON object that an item can hold; and what an index's pictures have of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from retrieval.errors import DamagedFileError
from retrieval.files import RESTORE
from retrieval.filters import Scalar
from retrieval.items import metadata_of
from retrieval.locations import folder_of
from retrieval.types import MetadataField

LABEL = "label"
MAX_METADATA = 64 * 1024  # bytes of one picture's metadata
_MAX_NESTING = 100  # levels; how many JSON may have differs with Python's version and SQLite's
_COMMON = 10  # values of a name that are listed
_KINDS = {str: "text", bool: "truth value", int: "number", float: "number"}  # to Python, True equals 1


def to_json(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The metadata as JSON (None when nothing is said), and what is wrong with it (None: nothing).

    Missing values (null, NaN) and bytes are left out; times become ISO text.
    """
    try:
        kept = {str(name): _plain(value) for name, value in values.items()}
    except _NestingError:
        return None, f"its metadata is nested more than {_MAX_NESTING} levels deep"
    text = json.dumps({name: value for name, value in kept.items() if value is not None}, sort_keys=True)
    if len(text) > MAX_METADATA:
        return None, f"its metadata has more than {MAX_METADATA // 1024} KiB"
    return (text, None) if values else (None, None)


def from_json(text: str, path: bytes) -> dict[str, Any]:
    """What is stored of the picture at `path`; without a label of its own, it has its folder for it: `folder_of`."""
    stored = {} if text == "{}" else _object(text, path)  # most have none, and parsing takes a while
    if LABEL not in stored and (folder := folder_of(path.decode(errors="replace"))):
        stored[LABEL] = folder
    return stored


def _object(text: str, path: bytes) -> dict[str, Any]:
    found = metadata_of(text)
    if found is None:
        where = path.decode(errors="replace")
        raise DamagedFileError(what="its metadata in the index is no JSON object", where=where, fix=RESTORE)
    return found


def fields(pictures: Iterable[Mapping[str, Any]]) -> dict[str, MetadataField]:
    """By name, the most frequent first: what `pictures` have, each with its metadata."""
    found: dict[str, dict[tuple[str, Scalar], int]] = {}  # of each name, how many have a value; "" for what is no value
    for metadata in pictures:
        for name, value in metadata.items():
            kind = _KINDS.get(type(value), "")
            key = kind, value if kind else ""
            counts = found.setdefault(name, {})
            counts[key] = counts.get(key, 0) + 1
    described = {name: _field(counts) for name, counts in found.items()}
    return dict(sorted(described.items(), key=lambda one: -one[1].pictures))


def _field(counts: Mapping[tuple[str, Scalar], int]) -> MetadataField:
    values = Counter({key: count for key, count in counts.items() if key[0]})
    numbers = [value for kind, value in values if kind == "number" and not isinstance(value, str)]
    return MetadataField(
        pictures=sum(counts.values()),
        values=len(values),
        common=tuple((value, count) for (_, value), count in values.most_common(_COMMON)),
        range=(min(numbers), max(numbers)) if numbers else None,
    )


class _NestingError(Exception):
    pass


def _plain(value: Any, level: int = 1) -> Any:
    if level > _MAX_NESTING:
        raise _NestingError
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, level + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, level + 1) for inner in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) else None
