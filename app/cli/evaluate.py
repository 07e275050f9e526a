"""`matvit eval`: the cross-test, query encoders against gallery encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from matvit.errors import SpecError
from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, write_json, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit.evaluation import CrossTest, Quality


def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="Class-per-folder tree, parquet file, or FOLDER/SPLIT of parquet shards: the queries.")
    ],
    *,
    gallery: Annotated[
        str | None, typer.Option(metavar="DATASET", help="What is searched. [default: DATASET without the query]")
    ] = None,
    encoder: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="Bundled name, checkpoint folder or hub id.")
    ] = services.DEFAULT_CHECKPOINT,
    queries: Annotated[str, typer.Option(metavar="SPECS", help="Submodels that search, comma-separated.")] = "S,M,L,XL",
    galleries: Annotated[str, typer.Option(metavar="SPECS", help="Submodels that index, comma-separated.")] = "XL",
    classes: Annotated[
        str | None, typer.Option(metavar="RANGE", help="Only these of the sorted class names, such as 50:101 or 0,3.")
    ] = None,
    keep_near_copies: Annotated[
        bool,
        typer.Option("--keep-near-copies", help="Keep queries of which the gallery holds nearly the same picture."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many queries, evenly spread.")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure what each submodel finds in an index made with another.

    A hit is right when it is a picture of the query's class. Without a gallery, each picture searches all others.

    \b
    Examples:
      matvit eval my-classes/
      matvit eval caltech-101/test --gallery caltech-101/train --classes 50:101 --json
    """
    with progress_bar() as progress:
        result = services.evaluate(
            dataset,
            gallery=gallery,
            checkpoint=encoder,
            queries=_split(queries, "--queries"),
            galleries=_split(galleries, "--galleries"),
            classes=classes,
            keep_near_copies=keep_near_copies,
            limit=limit,
            progress=progress,
        )
    if json:
        write_json(result.to_json())
    else:
        _show(result)


def _split(specs: str, option: str) -> list[str]:
    found = [spec.strip() for spec in specs.split(",") if spec.strip()]
    if not found:
        raise SpecError(what="names no submodel spec", where=option, fix=f"give some, for example {option} S,XL")
    return found


def _show(result: CrossTest) -> None:
    most = max(result.flops.values())
    rows = [
        [query, gallery, f"{result.flops[query] / most:.0%}", *_measures(quality)]
        for query, row in result.matrix.items()
        for gallery, quality in row.items()
    ]
    columns = ["query", "gallery", "FLOPs", "recall@1", "recall@10", "mAP@100", "agreement@10", "loss [95 % interval]"]
    write_table(
        columns,
        rows,
        title=f"{result.queries} in {result.gallery}",
        caption="FLOPs: of XL. agreement@10: share of XL's first 10 hits also found. "
        "loss: recall@1 of XL minus the query encoder's, in points, over the same queries.",
        text_columns=2,
    )
    left_out = {"near-copies": result.near_copies, "queries without a match": result.without_match}
    for name, count in left_out.items():
        if count:
            say(f"{count} {name} left out")
    for skipped in result.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")


def _measures(quality: Quality) -> list[str]:
    means = (quality.recall_at_1, quality.recall_at_10, quality.map_at_100, quality.agreement_at_10)
    loss = quality.loss
    return [*(f"{100 * mean:.1f}" for mean in means), f"{loss.points:+.1f} [{loss.low:+.1f}, {loss.high:+.1f}]"]
