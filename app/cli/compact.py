"""`matvit compact`: drop what no longer counts, and merge small segments."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, counted, write_json, write_line
from matvit_app.cli.progress import progress_bar


def compact(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="The index.")], *, json: JsonFlag = False
) -> None:
    """Make an index as small as its pictures, and as quick to open.

    Drops the rows of deleted and changed pictures and merges small segments. Every picture keeps its id;
    what is open keeps working.

    \b
    Example:
      matvit compact photos.index
    """
    with progress_bar() as progress:
        report = services.compact(path, progress=progress)
    if json:
        write_json(asdict(report))
    else:
        write_line(
            f"{path}: {counted(report.segments_before, 'segment')} -> {report.segments}, "
            f"{counted(report.dropped, 'dead item')} dropped, "
            f"{report.bytes_before:,} bytes -> {report.bytes:,}"
        )
