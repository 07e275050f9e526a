"""`--where` as people type it: "label=dog", "price>=3"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer

_CONDITION = re.compile(r"([^<>=]+)(<=|>=|<|>|=)(.+)", re.DOTALL)


def parse_conditions(texts: Sequence[str]) -> dict[str, Any] | None:
    """The conditions in the form that `Retriever.search` takes; several "=" of one name mean any of them.

    Raises typer.BadParameter.
    """
    where: dict[str, Any] = {}
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"--where {text!r} is no condition; give one such as label=dog or price>=3")
        name, sign, value = match[1].strip(), match[2], match[3].strip()
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


def _readings(text: str) -> list[str | float | bool]:
    """What a typed value may stand for in the metadata: the text, and the number or truth value that it spells."""
    if text in ("true", "false"):
        return [text, text == "true"]
    with suppress(ValueError):
        return [text, float(text)]
    return [text]
