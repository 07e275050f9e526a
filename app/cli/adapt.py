"""`matvit adapt`: the small encoders learn a person's own pictures; the index stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, say_left_out, write_json, write_line, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit.adapting import Adaptation


def adapt(
    checkpoint: Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder or a hub id.")],
    *,
    images: Annotated[Path, typer.Option(help="The folder of pictures to learn; no labels are needed.")],
    out: Annotated[Path, typer.Option(help="The folder of the adapted checkpoint.")],
    json: JsonFlag = False,
) -> None:
    """Fit S, M and L to your own pictures, without labels.

    The full encoder stays as it is to the bit, and so does every index that it made. The table shows how well each
    submodel agrees with XL, before and after, on pictures that were held back from the fit, every fifth in turn;
    near-copies of a picture, as of a burst, are left out. A submodel that does not surely gain, or whose first hit is
    clearly less often XL's, keeps its old weights; when none gains, nothing is written and the exit code is 1.

    \b
    Example:
      matvit adapt matvit-small --images photos/ --out adapted/
    """
    with progress_bar() as progress:
        result = services.adapt(checkpoint, images=images, out=out, progress=progress)
    if json:
        write_json(services.adaptation_json(result, out=out))
    else:
        _show(result)
    say_left_out(result.skipped, near_copies=result.near_copies)
    if not result.kept:
        say("nothing was surely gained on the pictures that were held back: nothing is written")
        raise typer.Exit(code=1)
    if not json:
        write_line(f"{out}: {', '.join(result.kept)} adapted; the index of the old checkpoint stays valid")


def _show(result: Adaptation) -> None:
    columns = {"cosine": "centred cosine", "first": "same first hit", "agreement_at_10": "agreement@10"}
    if any(gain.before.recall is not None for gain in result.gains.values()):
        columns = {"recall": "recall@1 by folder"} | columns
    rows = [
        [
            name,
            *(f"{100 * getattr(gain.before, field):.1f} → {100 * getattr(gain.after, field):.1f}" for field in columns),
            f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}",
            "adapted" if gain.kept else "as before",
        ]
        for name, gain in result.gains.items()
    ]
    write_table(
        ["query", *columns.values(), "its gain", "kept"],
        rows,
        title=f"{result.pictures} pictures, each held back once, in XL's index of the others",
        caption="Percent, beside XL's own answers; its gain: the 95 % interval of the paired difference.",
    )
