"""`matvit verify`: are the vectors of an index, or the weights of a checkpoint, what was written?"""

from __future__ import annotations

from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, counted, say, write_json, write_line, write_lines
from matvit_app.cli.progress import progress_bar


def verify(
    target: Annotated[str, typer.Argument(metavar="INDEX|CHECKPOINT", help="An index or a checkpoint.")],
    *,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pictures of an index to embed once more and compare; 0: none.",
            show_default="8, where the encoder that built it can be had",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="What embeds an index's pictures once more.", show_default="the index's own"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check an index or a checkpoint against its recorded hashes.

    Checkpoint: the weights, the encoder's sizes and the preprocessing are hashed.
    pareto.json and training.json may be missing, and are checked for their form.
    README.md is not read.

    Index: the newest generation and its segments; older ones are not looked at.
    A sample of its pictures is embedded once more: does the encoder still give what is stored?

    Exit code 1 when something is wrong, 2 when it cannot be told (a file may not be read, a newer format).

    \b
    Examples:
      matvit verify photos.index --sample 100
      matvit verify matvit-small
    """
    with progress_bar() as progress:
        result = services.verify(target, sample=sample, checkpoint=checkpoint, progress=progress)
    if json:
        write_json(
            {
                "target": target,
                "kind": result.kind,
                "ok": not result.problems,
                "problems": list(result.problems),
                "sampled": result.sampled,
                "unusable": result.unusable,
                "unsampled": result.unsampled,
            }
        )
    else:
        write_lines(result.problems, of="problems")
        if result.unsampled and not result.problems:
            say(f"no picture was embedded once more: {result.unsampled}")
        elif sample != 0 and result.kind == "index" and not result.problems:
            gone = f"{result.unusable} gone or changed" + ("; index their folders again" if result.unusable else "")
            say(f"{counted(result.sampled, 'picture')} embedded once more, {gone}")
        bad = "cannot be compared with its pictures" if result.unsampled else "is damaged"
        write_line(f"{target}: {result.kind} {bad if result.problems else 'is whole'}")
    if result.problems:
        raise typer.Exit(code=1)
