"""`--where` as people type it: "label=dog", "price>=3"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from retrieval.filters import Scalar

_CONDITION = re.compile(r"([^<>=]+)(<=|>=|<|>|=)(.+)", re.DOTALL)
_NAMED = 5  # values that are named for one that no picture has
_COMPARED = 1000  # of which the nearest are named, the most frequent: a million captions would take minutes
_LONG = 40  # characters of a value


def parse_conditions(texts: Sequence[str]) -> dict[str, Any] | None:
    """The conditions in the form that `Retriever.search` takes; several "=" of one name mean any of them.

    Raises typer.BadParameter.
    """
    where: dict[str, Any] = {}
    for text in texts:
        name, sign, value = _parts(text)
        if name.endswith("!") or value[:1] in ("=", "<", ">"):
            raise typer.BadParameter(f"--where {text!r} compares by an unknown sign; use one of =, <, <=, > and >=")
        known = where.setdefault(name, [] if sign == "=" else {})
        if isinstance(known, list) != (sign == "=") or sign in known:
            raise typer.BadParameter(f"--where {text!r} does not go with another condition on '{name}'; leave one out")
        if sign == "=":
            known += _readings(value)
        else:
            known[sign] = _readings(value)[-1]
    return where or None


def unknown_values(texts: Sequence[str], values_of: Callable[[str], Sequence[object]]) -> Iterator[str]:
    """One sentence for each value that is asked for and that no picture has; it names some that there are.

    `values_of`: what pictures have under a name, the most frequent first.
    """
    for name, sign, value in map(_parts, texts):
        known = values_of(name) if sign == "=" else ()
        if known and not any(reading in known for reading in _readings(value)):
            by_text = {typed(one).lower(): typed(one) for one in reversed(known[:_COMPARED])}
            near = [by_text[text] for text in get_close_matches(value.lower(), by_text, n=_NAMED)]
            named = _named([*near, *map(typed, known[:_NAMED])], of=len(known))
            yield f"no picture has {name}={value}; there {'is' if len(known) == 1 else 'are'} {named}"


def left_out(texts: Sequence[str], values_of: Callable[[str], Sequence[Scalar]]) -> Iterator[str]:
    """One sentence for each name of which a range of numbers leaves out texts that are none.

    `values_of`: what pictures have under a name, the most frequent first.
    """
    from retrieval.filters import as_number

    ranges = [(name, _readings(value)[-1]) for name, sign, value in map(_parts, texts) if sign != "="]
    for name in dict.fromkeys(name for name, limit in ranges if isinstance(limit, int | float)):
        others = [value for value in values_of(name) if isinstance(value, str) and as_number(value) is None]
        if others:
            named = _named(map(typed, others[:_NAMED]), of=len(others))
            yield f"pictures whose '{name}' is no number are left out: {named}"


def _named(values: Iterable[str], *, of: int) -> str:
    named = list(dict.fromkeys(values))[:_NAMED]
    return ", ".join(named) + (f", and {of - len(named)} more" if of > len(named) else "")


def _parts(text: str) -> tuple[str, str, str]:
    """Name, sign and value of one condition."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(
            f"--where {text!r} is no condition; give one such as label=dog or 'price>=3', in quotes: "
            "the shell takes > for itself"
        )
    return match[1].strip(), match[2], match[3].strip()


def typed(value: object) -> str:
    """A value of the metadata as people type it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _readings(text: str) -> list[str | int | float | bool]:
    """What a typed value may stand for in the metadata: the text, and the number or truth value that it spells."""
    if text in ("true", "false"):
        return [text, text == "true"]
    from retrieval.filters import as_number

    number = as_number(text)
    too_large = isinstance(number, float) and not isfinite(number)
    return [text] if number is None or too_large else [text, number]
