"""What callers give as numbers: a bool is one to Python, but means none; numpy's are none, but mean one."""

from __future__ import annotations

from numbers import Real
from operator import index


def is_number(value: object) -> bool:
    """Whether `value` is a real number; NaN is one, and compares with nothing."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether `value` is one whole number: arrays have `__index__`, too, but raise unless they hold just one."""
    if isinstance(value, bool):
        return False
    try:
        return index(value) is not None  # type: ignore[arg-type]
    except Exception:  # numpy's and torch's raise what they like
        return False
