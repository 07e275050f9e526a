"""`matvit train`: train an elastic encoder as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, write_json, write_line
from matvit_app.cli.progress import progress_bar


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")],
    *,
    out: Annotated[Path, typer.Option(help="The folder of the run and its checkpoint.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming an unfinished run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to OUT/tensorboard, too.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train an elastic encoder as a recipe says.

    The same command resumes a run that was interrupted.

    \b
    Examples:
      matvit train matvit-small --out runs/small
      matvit train my-recipe.yaml --out runs/mine --fresh
    """
    with progress_bar() as progress:
        result = services.train(recipe, out=out, resume=not fresh, tensorboard=tensorboard, progress=progress)
    if result["already_complete"]:
        say(f"this run was complete: {out / 'encoder'} is its checkpoint; to train anew, give --fresh or another --out")
    if json:
        write_json(result)
    else:
        write_line(f"{out}: {result['encoder']}, space {result['space_id']:.8}, {result['seconds']:.0f} s")
        if not result["metrics"]:
            say(f"the recipe names no validation: measure it with matvit eval DATASET --checkpoint {out / 'encoder'}")
