"""Conditions on pictures' metadata: `where={"label": ["cat", "dog"], "price": {">=": 3, "<": 5}}`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from matvit.metrics import IntArray
from retrieval.errors import SearchError

Scalar = str | int | float | bool
Where = Mapping[str, Scalar | Sequence[Scalar] | Mapping[str, Scalar]]
"""By metadata name: a value, several (any of them), or bounds by comparison. All names must hold."""

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Column:
    """What every picture has under one metadata name: the positions of each value, ascending.

    Values that are no text, number or truth value (lists, objects, null) can be stored, but not asked for.
    """

    positions: Mapping[tuple[str, Scalar], IntArray]  # by kind and value: to Python, True equals 1

    @classmethod
    def of(cls, values: Sequence[object]) -> Column:
        """`values[position]`, None where there is none."""
        found: dict[tuple[str, Scalar], list[int]] = {}
        for position, value in enumerate(values):
            if isinstance(value, Scalar):
                found.setdefault(_keyed(value), []).append(position)
        return cls({key: np.array(rows, dtype=np.int64) for key, rows in found.items()})


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of these values."""

    values: tuple[Scalar, ...]

    def select(self, column: Column, *, name: str) -> IntArray:
        """Ascending positions. A value that no picture has finds nothing."""
        del name
        return _joined([column.positions[key] for key in {_keyed(v) for v in self.values} if key in column.positions])


@dataclass(frozen=True, slots=True)
class Bounds:
    """All of these comparisons, such as (">=", 3); what compares with their kind is in `_comparable`."""

    limits: tuple[tuple[str, Scalar], ...]

    def select(self, column: Column, *, name: str) -> IntArray:
        """Ascending positions. Raises SearchError when no picture has a value that compares with the bounds' kind."""
        kind = " and ".join(sorted({_kind(limit) for _, limit in self.limits}))
        comparable = _comparable(column, kind)
        if not comparable:
            raise _refused(name, f"has no {kind} to compare", "compare with what it has")
        return _joined([rows for value, rows in comparable if self._holds(value)])

    def _holds(self, value: Scalar) -> bool:
        return all(_COMPARISONS[sign](value, limit) for sign, limit in self.limits)


Condition = AnyOf | Bounds


def as_number(value: Scalar) -> int | float | None:
    """What numbers compare with: a number, or one that is written as text, such as "007"; None for any other."""
    if isinstance(value, str):
        with suppress(ValueError):  # no whole number, or one of thousands of digits
            return int(value) if _NUMBER.fullmatch(value) else None  # a float would round those of 17 digits
        return float(value)
    return None if isinstance(value, bool) else value


def _comparable(column: Column, kind: str) -> Sequence[tuple[Scalar, IntArray]]:
    """The values that compare with limits of this kind, as that kind, with their positions; no truth values.

    One list's column can be read as numbers and another's, where a cell is none, as text: neither is passed over.
    """
    values = [(value, rows) for (_, value), rows in column.positions.items() if not isinstance(value, bool)]
    if kind == "number":
        numbers = ((as_number(value), rows) for value, rows in values)
        return [(number, rows) for number, rows in numbers if number is not None]
    if kind == "text" and any(isinstance(value, str) for value, _ in values):  # or it is a mistake: "10" < "9"
        return [(str(value), rows) for value, rows in values]
    return []


def parse_where(where: Where) -> dict[str, Condition]:
    """The condition on each name. Raises SearchError for what is none."""
    if not isinstance(where, Mapping):
        raise _refused("where", f"is a {type(where).__name__}", 'give a mapping such as {"label": "dog"}')
    return {name: _condition(name, asked) for name, asked in where.items()}


def _condition(name: str, asked: object) -> Condition:
    if isinstance(asked, Scalar):
        return AnyOf((_checked(name, asked),))
    if isinstance(asked, Mapping):
        for sign in asked:
            if sign not in _COMPARISONS:
                raise _refused(name, f"is compared by {sign!r}", f"use one of {', '.join(_COMPARISONS)}")
        if not asked:
            raise _refused(name, "has no bound", 'give some, such as {">=": 3}')
        limits = tuple((sign, _checked(name, limit)) for sign, limit in asked.items())
        if any(isinstance(limit, bool) for _, limit in limits):
            raise _refused(name, "is compared with true or false", "compare with numbers or text")
        return Bounds(limits)
    if isinstance(asked, Sequence | set | frozenset) and asked and not isinstance(asked, bytes | bytearray):
        return AnyOf(tuple(_checked(name, value) for value in asked))
    raise _refused(name, f"is asked to be {asked!r}", 'give a value, a list of values, or bounds such as {">=": 3}')


def _checked(name: str, value: object) -> Scalar:
    if not isinstance(value, Scalar) or (isinstance(value, float) and math.isnan(value)):
        raise _refused(name, f"is asked to be {value!r}", "give text, a number, true or false")
    return value


def _kind(value: Scalar) -> str:
    return "text" if isinstance(value, str) else "truth value" if isinstance(value, bool) else "number"


def _keyed(value: Scalar) -> tuple[str, Scalar]:
    return _kind(value), value


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def _refused(name: str, what: str, fix: str) -> SearchError:
    return SearchError(what=f"'{name}' {what}" if name != "where" else f"where {what}", where="where", fix=fix)
