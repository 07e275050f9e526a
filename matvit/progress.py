"""Progress is handed in by the caller: the CLI passes a bar, a page its own, a test `list.append`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """One step of a long task: `done` of `total` units (total None: unknown) of `stage`."""

    stage: str
    done: int
    total: int | None
    unit: str
    note: str = ""  # short live text, for example "3 skipped" or "loss 1.25"


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """The progress callback that shows nothing."""


def in_short(rate: float) -> str:
    """A rate for people: whole from ten on, else with one decimal."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
