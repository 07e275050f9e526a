"""`matvit search`: pictures that look like a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, write_json, write_table

if TYPE_CHECKING:
    from retrieval.types import Hits


def search(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="The pictures to search with.", show_default=False)
    ],
    *,
    path: Annotated[Path, typer.Option("--index", help="The index to search.")] = services.DEFAULT_INDEX,
    encoder: Annotated[
        str, typer.Option(metavar="SPEC", help="The submodel that searches: S, M, L, XL, or a spec such as 6S.6XL.")
    ] = "XL",
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Hits for each picture.")] = 10,
    json: JsonFlag = False,
) -> None:
    """Find the pictures of an index that look most like the given ones.

    Any submodel of the encoder that made the index can search it: smaller ones are faster.

    \b
    Examples:
      matvit search picture.jpg --encoder S
      matvit search *.jpg --index products.index -k 3 --json
    """
    answers = services.search(images, path=path, encoder=encoder, k=k)
    if json:
        write_json({"queries": [services.hits_json(hits, encoder=encoder) for hits in answers]})
        return
    for hits in answers:
        _show(hits)


def _show(hits: Hits) -> None:
    latency = hits.latency_ms
    here = Path.cwd()
    rows = [[str(hit.rank), f"{hit.score:.3f}", _short(hit.path, here)] for hit in hits]
    write_table(
        ["rank", "score", "picture"],
        rows,
        title=f"{hits.query}",
        caption=f"{hits.spec} on {hits.runtime}: {latency.total:.1f} ms = preprocess {latency.preprocess:.1f} "
        f"+ encode {latency.encode:.1f} + search {latency.search:.1f}",
        text_columns=3,
    )


def _short(path: Path, here: Path) -> str:
    return os.fspath(path.relative_to(here) if path.is_relative_to(here) else path)
