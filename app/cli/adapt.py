"""`matvit adapt`: the small encoders learn a person's own pictures; the index stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, write_json, write_line, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit.adapting import Adaptation


def adapt(
    checkpoint: Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder or a hub id.")],
    *,
    images: Annotated[Path, typer.Option(help="The folder of pictures to learn; no labels are needed.")],
    out: Annotated[Path, typer.Option(help="The folder of the adapted checkpoint.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="How long to train.")] = 10.0,
    json: JsonFlag = False,
) -> None:
    """Tune S, M and L on your own pictures, without labels.

    The full encoder stays as it is to the bit, and so does every index that it made. Every fifth picture is held
    back: on these the table shows how well each submodel agrees with XL, before and after. A submodel that agrees
    no better keeps its old weights; when none does better, nothing is written and the exit code is 1.

    \b
    Example:
      matvit adapt matvit-small --images photos/ --out adapted/
    """
    with progress_bar() as progress:
        result = services.adapt(checkpoint, images=images, out=out, minutes=minutes, progress=progress)
    if json:
        write_json(services.adaptation_json(result, out=out))
    else:
        _show(result)
    for path, reason in result.skipped:
        say(f"skipped {path}: {reason}")
    if not result.kept:
        say("nothing was gained on the pictures that were held back: nothing is written")
        raise typer.Exit(code=1)
    if not json:
        write_line(f"{out}: {', '.join(result.kept)} adapted; the index of the old checkpoint stays valid")


def _show(result: Adaptation) -> None:
    rows = [
        [
            name,
            *(
                f"{100 * getattr(side[name], field):.1f}"
                for field in _MEASURES
                for side in (result.before, result.after)
            ),
            "adapted" if name in result.kept else "as before",
        ]
        for name in result.before
    ]
    columns = ["query", *(f"{title} {when}" for title in _MEASURES.values() for when in ("before", "after")), "kept"]
    write_table(
        columns,
        rows,
        title=f"{result.held_back} pictures that were held back, in XL's index of all pictures",
        caption=f"Percent, beside XL's own answers; {result.pictures} pictures trained on, {result.steps} steps.",
    )


_MEASURES = {"cosine": "centred cosine", "first": "same first hit", "agreement_at_10": "agreement@10"}
