"""`matvit eval`: the cross-test, query encoders against gallery encoders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from matvit.errors import SpecError
from matvit_app import services
from matvit_app.cli.output import JsonFlag, say, write_json, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit.quality import Quality
    from matvit_app.evaluation import Evaluation


def evaluate(
    dataset: Annotated[
        str,
        typer.Argument(
            help="The queries: class-per-folder tree, parquet or tar file, FOLDER/SPLIT of shards, or a benchmark's "
            "folder (CUB-200-2011, Online Products, In-shop, revisited Oxford and Paris); here, or below MATVIT_DATA."
        ),
    ],
    *,
    gallery: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="What is searched.", show_default="DATASET without the query, or its own"),
    ] = None,
    encoder: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="Bundled name, checkpoint folder or hub id.")
    ] = services.DEFAULT_CHECKPOINT,
    queries: Annotated[
        str,
        typer.Option(metavar="SPECS", help="Submodels that search, comma-separated; mixed:200 for Mix'n'Match."),
    ] = "S,M,L,XL",
    galleries: Annotated[str, typer.Option(metavar="SPECS", help="Submodels that index, comma-separated.")] = "XL",
    classes: Annotated[
        str | None, typer.Option(metavar="RANGE", help="Only these of the sorted class names, such as 50:101 or 0,3.")
    ] = None,
    protocol: Annotated[
        Literal["easy", "medium", "hard"] | None,
        typer.Option(help="Of revisited Oxford and Paris.", show_default="medium"),
    ] = None,
    keep_near_copies: Annotated[
        bool,
        typer.Option("--keep-near-copies", help="Keep queries of which the gallery holds nearly the same picture."),
    ] = False,
    recall_at: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Hits that recall is measured at, comma-separated.")
    ] = "1,10",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many queries, evenly spread; the gallery stays whole.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cuda where there is one")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Draw FLOPs against recall@1 in the first gallery.")
    ] = None,
    write_checkpoint_table: Annotated[
        bool,
        typer.Option(
            "--write-table", help="Make the result the checkpoint's table: named specs, and mixed ones worth having."
        ),
    ] = False,
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
    from matvit.durable import write_atomic
    from matvit.tasks import read_task
    from matvit_app.evaluation import evaluate as run
    from matvit_app.evaluation import table_folder, table_specs
    from matvit_app.evaluation import write_table as save_table

    folder = table_folder(encoder) if write_checkpoint_table else None
    asked, indexed = _split(queries, "--queries"), _split(galleries, "--galleries")
    hits = _numbers(recall_at)
    if plot is not None:
        from matvit_app.plane import plane_html

        _check_plot(plot)
    model = services.load_encoder(encoder).to(_device(device))
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
        _show(found)
    # After the figures: a disk that refuses to write does not take them along.
    if plot is not None:
        write_atomic(plot.resolve(), plane_html(found).encode())
        say(f"drawn: {plot}")
    if folder is not None:
        say(f"{folder}: its table has {save_table(model, found, folder=folder)} rows")


def _check_plot(plot: Path) -> None:
    from matvit.checkpoint import refuse_inside

    if not plot.resolve().parent.is_dir():
        raise typer.BadParameter(f"there is no folder '{plot.parent}'", param_hint="--plot")
    there = [plot] if plot.exists() else []
    if not (all(map(Path.is_file, there)) and all(os.access(one, os.W_OK) for one in (*there, plot.resolve().parent))):
        raise typer.BadParameter(f"'{plot}' is no file that may be written", param_hint="--plot")
    refuse_inside(plot)


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


def _show(found: Evaluation) -> None:
    result = found.result
    most = result.flops[result.reference[0]]
    shown = {*found.named, *found.front}
    measures = list(next(iter(next(iter(result.matrix.values())).values())).measures)
    rows = [
        [query, gallery, f"{result.flops[query] / most:.0%}", *_figures(quality)]
        for query, row in result.matrix.items()
        if query in shown
        for gallery, quality in row.items()
    ]
    write_table(
        ["query", "gallery", "FLOPs", *(name.replace("map", "mAP") for name in measures), "loss [95 % interval]"],
        rows,
        title=f"{result.queries} in {result.gallery}",
        caption="FLOPs: of XL. agreement@10: share of XL's first 10 hits also found. "
        "loss: recall@1 of XL minus the query encoder's, in points, over the same queries.",
        text_columns=2,
    )
    _show_mixed(found)
    left_out = {"near-copies": result.near_copies, "queries without a match": result.without_match}
    for name, count in left_out.items():
        if count:
            say(f"{count} {name} left out")
    for skipped in result.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")


def _show_mixed(found: Evaluation) -> None:
    if found.mixed is None:
        return
    points = found.points
    told = found.to_json()["mixed"]
    rows = [
        [name, f"{kind['above_line']} of {kind['specs']}", *(f"{far:+.1f}" for far in kind["distance"].values())]
        for name, kind in (("as the paper advises", told["heuristic"]), ("at random", told["random"]))
        if kind["specs"]
    ]
    write_table(
        ["mixed submodels", "above the line", "mean distance to it", "worst", "best"],
        rows,
        title=f"{len(points)} mixed submodels and the line between the uniform ones",
        caption="distance: recall@1 in points. The table above shows those on the Pareto front.",
    )
    if len(points) < found.mixed.asked:
        say(f"{found.mixed.asked} mixed submodels were asked for, {len(points)} different ones were found")


def _figures(quality: Quality) -> list[str]:
    means = [f"{100 * mean.value:.1f}" for mean in quality.measures.values()]
    loss = quality.loss
    return [*means, f"{loss.value:+.1f} [{loss.low:+.1f}, {loss.high:+.1f}]"]
