"""`matvit eval`: the cross-test, query encoders against gallery encoders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from matvit.errors import SpecError
from matvit_app import services
from matvit_app.cli.evaluation_tables import show
from matvit_app.cli.output import JsonFlag, checkpoint_option, say, write_json
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit_app.evaluation import Evaluation


Dataset = Annotated[
    str,
    typer.Argument(
        help="The queries: class-per-folder tree, parquet or tar file, FOLDER/SPLIT of shards, or a benchmark's "
        "folder (CUB-200-2011, Online Products, In-shop, revisited Oxford and Paris); here, or below MATVIT_DATA."
    ),
]
Gallery = Annotated[
    str | None,
    typer.Option(metavar="DATASET", help="What is searched.", show_default="DATASET without the query, or its own"),
]
Checkpoint = Annotated[
    str,
    checkpoint_option("Bundled name, checkpoint folder or hub id."),
]
Queries = Annotated[
    str, typer.Option(metavar="SPECS", help="Submodels that search, comma-separated; mixed:200 for Mix'n'Match.")
]
Galleries = Annotated[str, typer.Option(metavar="SPECS", help="Submodels that index, comma-separated.")]
Classes = Annotated[
    str | None, typer.Option(metavar="RANGE", help="Only these of the sorted class names, such as 50:101 or 0,3.")
]
Protocol = Annotated[
    Literal["easy", "medium", "hard"] | None,
    typer.Option(help="Of revisited Oxford and Paris.", show_default="medium"),
]
KeepNearCopies = Annotated[
    bool,
    typer.Option("--keep-near-copies", help="Keep queries of which the gallery holds nearly the same picture."),
]
RecallAt = Annotated[str, typer.Option(metavar="NUMBERS", help="Hits that recall is measured at, comma-separated.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many queries, evenly spread; the gallery stays whole.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cuda where there is one")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Draw FLOPs against recall@1 in the first gallery.")
]
WriteTable = Annotated[
    bool,
    typer.Option(
        "--write-table", help="Make the result the checkpoint's table: named specs, and mixed ones worth having."
    ),
]


def evaluate(
    dataset: Dataset,
    *,
    gallery: Gallery = None,
    checkpoint: Checkpoint = services.DEFAULT_CHECKPOINT,
    queries: Queries = "S,M,L,XL",
    galleries: Galleries = "XL",
    classes: Classes = None,
    protocol: Protocol = None,
    keep_near_copies: KeepNearCopies = False,
    recall_at: RecallAt = "1,10",
    limit: Limit = None,
    device: Device = None,
    plot: Plot = None,
    write_checkpoint_table: WriteTable = False,
    json: JsonFlag = False,
) -> None:
    """Measure what each submodel finds in an index made with another.

    A hit is right when it is a picture of the query's class. Without a gallery, each picture searches all others.

    \b
    Examples:
      matvit eval my-classes/
      matvit eval caltech-101/test --gallery caltech-101/train --classes 50:101 --json
      matvit eval roxford5k --protocol hard --queries S,XL-r224 --galleries XL-r224
      matvit eval my-classes/ --queries S,M,L,XL,mixed:200 --plot plane.html
    """
    from matvit.tasks import read_task
    from matvit_app.evaluation import evaluate as run
    from matvit_app.evaluation import table_folder, table_specs
    from matvit_app.evaluation import write_table as save_table

    folder = table_folder(checkpoint) if write_checkpoint_table else None
    asked, indexed = _split(queries, "--queries"), _split(galleries, "--galleries")
    hits = _numbers(recall_at)
    draw = None if plot is None else _plotter(plot)
    model = services.load_encoder(checkpoint).to(_device(device))
    if folder is not None:
        asked += table_specs(model, gallery=indexed[0])
    task = read_task(dataset, gallery=gallery, classes=classes, protocol=protocol)
    with progress_bar() as progress:
        found = run(
            model,
            task,
            queries=asked,
            galleries=indexed,
            keep_near_copies=keep_near_copies,
            recall_at=hits,
            limit=limit,
            progress=progress,
        )
    if json:
        write_json(found.to_json())
    else:
        show(found)
    # After the figures: a disk that refuses to write does not take them along.
    if draw is not None:
        draw(found)
    if folder is not None:
        say(f"{folder}: its table has {save_table(model, found, folder=folder)} rows")


def _plotter(plot: Path) -> Callable[[Evaluation], None]:
    """What draws an evaluation to the file; packages or a place that lack for it are told now, before the work."""
    from matvit.checkpoint import refuse_inside
    from matvit.durable import write_atomic
    from matvit_app.plane import is_plane, plane_html

    if plot.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"'{plot}' is no page: give a name that ends in .html", param_hint="--plot")
    if not plot.resolve().parent.is_dir():
        raise typer.BadParameter(f"there is no folder '{plot.parent}'", param_hint="--plot")
    there = [plot] if plot.exists() else []
    if not (all(map(Path.is_file, there)) and all(os.access(one, os.W_OK) for one in (*there, plot.resolve().parent))):
        raise typer.BadParameter(f"'{plot}' is no file that may be written", param_hint="--plot")
    if there and not is_plane(plot):
        raise typer.BadParameter(f"'{plot}' is there already, and no plot: give another name", param_hint="--plot")
    refuse_inside(plot)

    def draw(found: Evaluation) -> None:
        write_atomic(plot.resolve(), plane_html(found).encode())
        say(f"drawn: {plot}")

    return draw


def _split(specs: str, option: str) -> list[str]:
    found = [spec.strip() for spec in specs.split(",") if spec.strip()]
    if not found:
        raise SpecError(what="names no submodel spec", where=option, fix=f"give some, for example {option} S,XL")
    return found


def _numbers(text: str) -> list[int]:
    if re.fullmatch(r"\s*[1-9]\d{0,5}\s*(,\s*[1-9]\d{0,5}\s*)*", text, re.ASCII) is None:
        raise typer.BadParameter(f"'{text}' are no numbers of hits, such as 1,10,100", param_hint="--recall-at")
    return [int(number) for number in text.split(",")]


def _device(name: str | None) -> Any:
    import torch

    try:
        if name and name.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError  # others hold no values, or want another program
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).tolist()  # "meta" computes nothing
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise typer.BadParameter(f"'{name}' cannot be used on this machine", param_hint="--device") from error
    return device
