"""`matvit search`: pictures that look like a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, counted, say, short_path, short_paths, write_json, write_table
from matvit_app.cli.progress import progress_bar
from matvit_app.cli.where import left_out, parse_conditions, unknown_values

if TYPE_CHECKING:
    from matvit.encoder import ImageEncoder
    from retrieval.types import Hits


Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[IMAGES...]",
        show_default=False,
        help="The pictures to search with, each on its own: files, places such as shard.tar#name, or URLs.",
    ),
]
Items = Annotated[
    list[int] | None, typer.Option("--item", metavar="ID", help="Search with a picture of the index; repeatable.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="The submodel that searches: S, M, L, XL, a spec such as 6S.6XL, or auto.",
        show_default="XL",
    ),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        help="The best submodel that encodes a 640 x 480 JPEG in this time, measured on this machine: once a "
        "day, that takes some seconds.",
        show_default=False,
    ),
]
MinRecall = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="The cheapest submodel that keeps this share of XL's recall, by the checkpoint's table.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="What SPEC is cut from, such as an adapted checkpoint.",
        show_default="the one that built the index",
    ),
]
Depth = Annotated[
    int | None,
    typer.Option("-k", "--k", min=1, help="Hits for each query.", show_default="10; with --min-score: all"),
]
MinScore = Annotated[
    float | None, typer.Option(min=-1, max=1, help="Only hits that score at least this.", show_default=False)
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help='Only pictures whose metadata is so: label=dog, "price>=3". Repeatable; several = mean any of them.',
    ),
]
ExcludeSelf = Annotated[
    bool, typer.Option("--exclude-self", help="Leave out the query's own file, and files with its content.")
]
Unlike = Annotated[
    list[Path] | None,
    typer.Option(metavar="IMAGE", help="Less like this picture; repeatable. Makes all pictures one query."),
]
Fuse = Annotated[
    Literal["mean", "rank"] | None,
    typer.Option(help="All pictures are one query: by their mean, or by the rank in the answer to each."),
]


def search(
    images: Images = None,
    *,
    path: Annotated[Path, typer.Option("--index", help="The index to search.")] = services.DEFAULT_INDEX,
    items: Items = None,
    encoder: Encoder = None,
    max_latency_ms: MaxLatency = None,
    min_recall: MinRecall = None,
    checkpoint: Checkpoint = None,
    k: Depth = None,
    min_score: MinScore = None,
    where: Where = None,
    exclude_self: ExcludeSelf = False,
    unlike: Unlike = None,
    fuse: Fuse = None,
    json: JsonFlag = False,
) -> None:
    """Find the pictures of an index that look most like the given ones.

    Any submodel of the encoder that made the index can search it: smaller ones are faster.

    \b
    Examples:
      matvit search picture.jpg --encoder S
      matvit search picture.jpg --max-latency-ms 15
      matvit search *.jpg --index products.index -k 3 --json
      matvit search picture.jpg --where label=dog --where "year>=2020" --min-score 0.5
      matvit search this.jpg that.jpg --unlike other.jpg --fuse rank
    """
    from retrieval import Blend

    like = [*(images or ()), *(items or ())]
    if not like:
        raise typer.BadParameter("there is nothing to search with; name pictures, or give --item")
    _refuse_checkpoint(encoder)
    conditions = parse_conditions(where or ())
    retriever = services.open_retriever(path, checkpoint=checkpoint, pictures=[*like, *(unlike or ())])
    if not len(retriever):
        say(f"{path}: the index holds no pictures yet")
    if not images and not unlike and (encoder or max_latency_ms or min_recall):
        say("no picture is encoded: the index has the items' embeddings; what chooses an encoder is not used")
    # Before the encoder is loaded, which takes seconds.
    retriever.search_many([], k=k, min_score=min_score, where=conditions)
    for note in (*unknown_values(where or (), retriever.values), *left_out(where or (), retriever.values)):
        say(note)
    if images or unlike:
        with progress_bar() as progress:
            ready = retriever.query_encoder(
                encoder, max_latency_ms=max_latency_ms, min_recall=min_recall, progress=progress
            )
        _warm_up(ready)
    answers = retriever.search_many(
        [Blend(like, unlike=unlike or (), fusion=fuse or "mean")] if fuse or unlike else like,
        encoder=encoder,
        max_latency_ms=max_latency_ms,
        min_recall=min_recall,
        k=10 if k is None and min_score is None else k,
        min_score=min_score,
        where=conditions,
        exclude_self=exclude_self,
    )
    if json:
        limited = max_latency_ms is not None or min_recall is not None
        encoder = encoder or ("auto" if limited else "XL")
        write_json({"queries": [services.hits_json(hits, encoder=encoder) for hits in answers]})
        return
    for hits in answers:
        _show(hits)
    if gone := services.gone(hit.path for hits in answers for hit in hits):
        fix = "matvit index FOLDER --delete forgets them, matvit delete FOLDER all of one that was moved or is gone"
        say(f"not there now: {counted(len(gone), 'file')} of these; {fix}")


def _refuse_checkpoint(encoder: str | None) -> None:
    if encoder == services.DEFAULT_CHECKPOINT or (encoder and (Path(encoder) / "config.json").is_file()):
        raise typer.BadParameter(
            f"'{encoder}' is a checkpoint, no submodel spec; did you mean --checkpoint {encoder}?",
            param_hint="--encoder",
        )


def _warm_up(encoder: ImageEncoder) -> None:
    """Embed any picture: the first one of a process takes many times as long, which is not what a query takes."""
    from PIL import Image

    encoder.embed([Image.new("RGB", (256, 256))])


def _show(hits: Hits) -> None:
    latency = hits.latency_ms
    rows = [
        [
            str(hit.rank),
            str(hit.id),
            f"{hit.score:.3f}",
            short_path(hit.path),
            _text(hit.metadata),
        ]
        for hit in hits
    ]
    write_table(
        ["rank", "id", "score", "picture", "metadata"],
        rows,
        title=short_paths(f"{hits.query}"),
        caption=f"{hits.spec} on {hits.runtime}: {latency.total:.1f} ms = preprocess {latency.preprocess:.1f} "
        f"+ encode {latency.encode:.1f} + search {latency.search:.1f}"
        if len(hits)
        else "nothing found",
        text_columns=5,
    )


def _text(metadata: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in metadata.items())
