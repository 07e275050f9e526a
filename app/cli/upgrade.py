"""`matvit upgrade`: move an index to another encoder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, checkpoint_option, say, say_first, write_json, write_line
from matvit_app.cli.progress import progress_bar


def upgrade(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="The index.")],
    *,
    checkpoint: Annotated[
        str,
        checkpoint_option("The new encoder: bundled name, checkpoint folder or hub id."),
    ],
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Go on without pictures whose files are gone.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Embed all pictures of an index with another encoder.

    The index serves as it is until all are done, and then changes in one step. Interrupt it and run it again:
    it continues. A picture whose file is gone cannot stay, since no embedding fits into both encoders' spaces:
    as long as there is one, nothing changes (exit code 1), unless --drop-missing is given. Then it is listed as
    skipped, and indexed again under its id once it is back.

    The index's own encoder at another place: only that place is noted.

    \b
    Example:
      matvit upgrade photos.index --checkpoint my-encoder/
    """
    with progress_bar() as progress:
        report = services.upgrade(path, checkpoint=checkpoint, drop_missing=drop_missing, progress=progress)
    missing = [{"path": os.fspath(file.path), "reason": file.reason} for file in report.missing]
    if json:
        write_json(
            {
                "embedded": report.embedded,
                "resumed": report.resumed,
                "missing": missing,
                "published": report.published,
                "seconds": report.seconds,
            }
        )
    else:
        state = "upgraded" if report.published else "not changed, since pictures are missing"
        if report.published and not (report.embedded or report.resumed or missing):
            state = "uses that encoder now, and nothing was to be embedded"
        write_line(
            f"{path}: {state}; {report.embedded} embedded, {report.resumed} by an earlier run, "
            f"{len(missing)} missing; {report.seconds:.1f} s"
        )
        say_first("missing", [f"{file.path}: {file.reason}" for file in report.missing])
        if not report.published:
            say("put them back and run this again, or go on without them: --drop-missing")
    if not report.published:
        raise typer.Exit(code=1)
