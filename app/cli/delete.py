"""`matvit delete`: take pictures out of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, write_json, write_line


def delete(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATHS...",
            help="What the index forgets, as a search names it: pictures, whole folders or shards, URLs.",
            show_default=False,
        ),
    ],
    *,
    path: Annotated[Path, typer.Option("--index", help="The index.")] = services.DEFAULT_INDEX,
    json: JsonFlag = False,
) -> None:
    """Take pictures out of an index; their files stay.

    Nothing is taken out if the index holds nothing of one of the names. A picture that still lies in a folder comes
    back when the folder is indexed again.

    \b
    Examples:
      matvit delete photos/blurred.jpg
      matvit delete old/ 'shards/7.tar#dog.jpg' --index products.index
    """
    deleted, left = services.delete(paths, path=path)
    if json:
        write_json({"deleted": deleted, "items": left})
    else:
        write_line(f"{path}: {deleted} deleted, {left} pictures left")
