"""`matvit repair`: make a damaged index whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, checkpoint_option, counted, say, say_first, write_json, write_line
from matvit_app.cli.progress import progress_bar


def repair(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="The index.")],
    *,
    checkpoint: Annotated[
        str | None,
        checkpoint_option("What embeds pictures again.", show_default="the index's own"),
    ] = None,
    drop_lost: Annotated[bool, typer.Option("--drop-lost", help="Go on without what cannot be brought back.")] = False,
    json: JsonFlag = False,
) -> None:
    """Make a damaged index whole, and remove what killed writers left.

    A lost CURRENT is found again, damaged embeddings are made again from the pictures. What cannot be brought back
    is listed, and as long as there is such a thing nothing changes (exit code 1), unless --drop-lost is given.

    \b
    Example:
      matvit repair photos.index
    """
    with progress_bar() as progress:
        report = services.repair(path, checkpoint=checkpoint, drop_lost=drop_lost, progress=progress)
    if json:
        write_json(
            {
                "damage": list(report.damage),
                "embedded": report.embedded,
                "lost": [{"path": os.fspath(file.path), "reason": file.reason} for file in report.lost],
                "lost_unnamed": report.lost_unnamed,
                "removed": list(report.removed),
                "generation": report.generation,
                "whole": report.whole,
            }
        )
    else:
        for sentence in report.damage:
            say(sentence)
        fate = "dropped" if drop_lost else "lost"
        say_first(fate, [f"{file.path}: {file.reason}" for file in report.lost])
        if report.lost_unnamed:
            then = "index the pictures' folders again" + ("" if drop_lost else " after that: --drop-lost")
            say(f"{fate} {report.lost_unnamed} items, skipped files too, whose names cannot be read: {then}")
        say_first("removed", report.removed)
        lost = (report.lost or report.lost_unnamed) and not drop_lost
        failing = "not changed: go on without what is lost by --drop-lost" if lost else "is not whole: index anew"
        state = "is whole" if report.whole else failing
        write_line(
            f"{path}: {state}; {counted(len(report.damage), 'problem')}, "
            f"{counted(report.embedded, 'picture')} embedded again, "
            f"{len(report.lost) + report.lost_unnamed} {fate}, {counted(len(report.removed), 'file')} removed"
        )
    if not report.whole:
        raise typer.Exit(code=1)
