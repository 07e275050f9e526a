"""`matvit duplicates`: pictures of an index that are, or look, the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, short_path, write_json, write_line, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from retrieval import Duplicate


_MIN_SCORE = 0.95


def duplicates(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="The index.")],
    *,
    min_score: Annotated[
        float | None,
        typer.Option(
            min=-1, max=1, help="Cosine similarity from which on two pictures are linked.", show_default="0.95"
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Only files with the same content: quick.")] = False,
    json: JsonFlag = False,
) -> None:
    """List groups of pictures that look the same.

    Every pair is compared, so the time grows with the square of the index. A group is all that links reach.
    Nothing is deleted.

    \b
    Examples:
      matvit duplicates photos.index
      matvit duplicates photos.index --min-score 0.98 --json
      matvit duplicates photos.index --exact
    """
    if exact and min_score is not None:
        raise typer.BadParameter("--exact and --min-score are both given; leave out one")
    score = None if exact else _MIN_SCORE if min_score is None else min_score
    with progress_bar() as progress:
        groups = services.duplicates(path, min_score=score, progress=progress)
    if json:
        write_json({"groups": [services.group_json(group) for group in groups]})
        return
    rows = [
        [str(number), short_path(picture.path), _content(picture, group[0]), f"{picture.score:.3f}"]
        for number, group in enumerate(groups, start=1)
        for picture in group
    ]
    write_line(f"{len(groups)} group{'s' * (len(groups) != 1)}, {len(rows)} pictures")
    if rows:
        write_table(["group", "picture", "content", "score"], rows, text_columns=3)


def _content(picture: Duplicate, first: Duplicate) -> str:
    said = "first" if picture is first else "same content" if picture.same_content else ""
    return ", ".join(filter(None, [said, "a link" * picture.is_link]))
