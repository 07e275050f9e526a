"""`matvit delete`: take pictures out of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, counted, write_json, write_line


def delete(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATHS...]",
            help="What the index forgets, as a search names it: pictures, whole folders or shards, URLs; no patterns.",
            show_default=False,
        ),
    ] = None,
    *,
    items: Annotated[
        list[int] | None, typer.Option("--item", metavar="ID", help="And a picture by its id; repeatable.")
    ] = None,
    path: Annotated[Path, typer.Option("--index", help="The index.")] = services.DEFAULT_INDEX,
    json: JsonFlag = False,
) -> None:
    """Take pictures out of an index; their files stay.

    Nothing is taken out if the index holds nothing of one of the names or ids. A picture that still lies in a folder
    comes back when the folder is indexed again.

    \b
    Examples:
      matvit delete photos/blurred.jpg
      matvit delete old/ 'shards/7.tar#dog.jpg' --index products.index
      matvit delete --item 42
    """
    if not (named := [*(paths or ()), *(items or ())]):
        raise typer.BadParameter("there is nothing to delete; name pictures or folders, or give --item")
    deleted, pictures, left = services.delete(named, path=path)
    if json:
        write_json({"deleted": deleted, "items": left})
    else:
        others = f" and {counted(deleted - pictures, 'skipped file')}" if deleted > pictures else ""
        write_line(f"{path}: {counted(pictures, 'picture')}{others} deleted, {counted(left, 'picture')} left")
