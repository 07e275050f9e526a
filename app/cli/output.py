"""What the commands print: results on stdout (tables, or one JSON document), everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matvit_app import services

if TYPE_CHECKING:
    from matvit.datasets import SkippedPicture

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

_WIDE = 160  # columns of a table that goes into a file or a pipe
_SHOWN = 10  # files that are listed for people; --json lists all


def counted(number: int, noun: str) -> str:
    """Such as "1 picture", "1,200 pictures"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def write_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command, on stdout.

    ASCII only: a path that is no valid text survives as an escaped surrogate, whatever the terminal's encoding.
    """
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def write_line(text: str) -> None:
    """One line of a result, on stdout."""
    typer.echo(printable(text))


def write_lines(texts: Sequence[str], *, of: str, most: int = _SHOWN) -> None:
    """Up to `most` lines of a result, and how many more there are `of` them."""
    for text in _first(texts, most, of=f" {of}"):
        write_line(text)


def write_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", caption: str = "", text_columns: int = 1
) -> None:
    """A table on stdout; the first `text_columns` columns are text, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text everywhere: a file name such as "[b]" is no markup.
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(printable(title)) if title else None,
        title_justify="left",
        show_header=any(columns),
    )
    for number, column in enumerate(columns):
        is_text = number < text_columns
        table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    console.print(table)
    if caption:
        console.print(Text(caption))


def checkpoint_option(help: str, *, show_default: bool | str = True) -> Any:  # noqa: A002 - as typer names it
    """The option that names a checkpoint, under its older name, too."""
    return typer.Option("--checkpoint", "--encoder", metavar="CHECKPOINT", help=help, show_default=show_default)


def short_path(path: Path) -> str:
    """A hit's path, relative to the current folder where it lies below it, or its URL."""
    here = Path.cwd()
    return os.fspath(path.relative_to(here)) if path.is_relative_to(here) else services.location(path)


def short_paths(query: str) -> str:
    """The same of each path in what was searched with, such as "/photos/a.jpg + /photos/b.jpg"."""
    here = re.escape(os.path.join(Path.cwd(), ""))  # noqa: PTH118 - with a separator at its end
    return re.sub(rf"(^| [+-] ){here}", r"\1", query)


def say(message: str) -> None:
    """One line for people, on stderr."""
    with suppress(OSError):  # nobody can be told that nobody can be told; the exit code still says it
        typer.echo(printable(message.replace("\n", " ")), err=True)


def say_first(fate: str, lines: Sequence[str], *, rest: str = "--json lists them") -> None:
    """Some of `lines`, each after the word that says what became of it, and how many more there are.

    `rest`: how to see those.
    """
    for line in _first(lines, _SHOWN, rest=rest):
        say(f"{fate} {line}")


def _first(lines: Sequence[str], most: int, *, of: str = "", rest: str = "--json lists them") -> Iterator[str]:
    yield from lines[:most]
    if len(lines) > most:
        yield f"{len(lines) - most} more{of}: {rest}"


def say_left_out(skipped: Iterable[SkippedPicture], *, near_copies: int) -> None:
    """What of a user's pictures was not used, and why."""
    for picture in skipped:
        say(f"skipped {picture.path}: {picture.reason}")
    if near_copies:
        say(f"near-copies of other pictures, left out: {near_copies}")


def printable(text: str) -> str:
    """`text` without what would upset a terminal: control characters and undecodable bytes become "?"."""
    return "".join(char if char.isprintable() else "?" for char in text)
