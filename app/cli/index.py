"""`matvit index`: make an index, or add pictures to it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matvit.progress import in_short
from matvit_app import services
from matvit_app.cli.output import JsonFlag, checkpoint_option, say, say_first, write_json, write_line
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from retrieval.types import IngestReport


Images = Annotated[
    list[Path],
    typer.Argument(
        metavar="IMAGES...",
        help="Pictures, folders, patterns, lists (.txt, .csv, .parquet), shards (.tar, .parquet), URLs.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    checkpoint_option(
        "Bundled name, checkpoint folder or hub id.",
        show_default=f"the index's own, for a new index {services.DEFAULT_CHECKPOINT}",
    ),
]
IndexType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="How it is searched: exact, hnsw, ivfpq, sq, or auto by size and --max-ram.",
        show_default="as it is; exact for a new index",
    ),
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What the searched vectors may take, such as 500MB or 2GB: --index-type auto, now and when it grows.",
        show_default=False,
    ),
]


def index(
    images: Images,
    *,
    path: Annotated[
        Path, typer.Option("--index", help="The index: a folder, made if it is not there.")
    ] = services.DEFAULT_INDEX,
    checkpoint: Checkpoint = None,
    delete: Annotated[
        bool,
        typer.Option(
            "--delete", help="Forget pictures whose files are gone, but where nothing is left: a disk may be away."
        ),
    ] = False,
    index_type: IndexType = None,
    max_ram: MaxRam = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 if a file was skipped.")] = False,
    json: JsonFlag = False,
) -> None:
    """Index pictures with the full encoder.

    Run it again to add pictures: those that the index knows are not embedded again.

    \b
    Examples:
      matvit index ~/Pictures
      matvit index shop/ warehouse/ --index products.index --delete
      matvit index products.csv 'shards/*.tar'
    """
    if index_type is not None and index_type not in (known := services.index_types()):
        raise typer.BadParameter(f"'{index_type}' is none of {', '.join(known)}", param_hint="--index-type")
    limit = None if max_ram is None else _bytes(max_ram)
    index_type = index_type or (None if limit is None else "auto")
    try:
        with progress_bar() as progress:
            report = services.ingest(
                images,
                path=path,
                checkpoint=checkpoint,
                delete=delete,
                index_type=index_type,
                max_ram=limit,
                progress=progress,
            )
    except KeyboardInterrupt:
        _show_interrupted(path)  # when the bar is gone: it would draw over the line
        raise
    info = services.index_info(path)
    if json:
        write_json(services.ingest_json(report) | services.search_json(info))
    else:
        _show(report, path, delete=delete)
        if index_type is not None:
            say(described(services.search_json(info)))
    if (strict and report.skipped) or (delete and report.gone):
        raise typer.Exit(code=1)


def _show_interrupted(path: Path) -> None:
    items = services.index_info(path).items if services.is_index(path) else 0
    if items:
        say(f"interrupted: {path} holds {items} pictures; run the same again to go on where it stopped")
    else:
        say("interrupted before any picture was indexed; run the same again")


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)B?", size)
    if found is None:
        raise typer.BadParameter(f"'{size}' is no size: give one such as 500MB or 2GB", param_hint="--max-ram")
    number = float(found[1]) * 1000.0 ** " kmgt".index(found[2].lower() or " ")
    if number >= 2**62:
        raise typer.BadParameter(f"'{size}' is more than any computer has", param_hint="--max-ram")
    return round(number)


def described(search: dict[str, Any]) -> str:
    """How an index is searched, in one line."""
    reason = f" ({search['index_reason']})" if search["index_reason"] else ""
    if search["recall_at_10"] is None:
        return f"{search['index_type']} search{reason}"
    used = search["index_parameters"]
    return (
        f"{search['index_type']} search{reason}, recall@10 {search['recall_at_10']:.3f} of exact search on "
        f"{used['held_out']:,} held-out pictures with effort {used['effort']} and depth {used['depth']}"
    )


def _show(report: IngestReport, path: Path, *, delete: bool) -> None:
    from retrieval.locations import location

    speed = f"{in_short(report.images_per_second)} pictures/s, " if report.indexed else ""
    write_line(
        f"{path}: {report.indexed} indexed, {report.unchanged} unchanged, {report.deleted} deleted, "
        f"{len(report.skipped)} skipped; {speed}{report.seconds:.1f} s"
    )
    if report.gone:
        files = "1 file of the index is" if report.gone == 1 else f"{report.gone} files of the index are"
        them = "it" if report.gone == 1 else "them"
        if delete:
            say(f"{files} gone, and stay there; if no disk is away, matvit delete PATH --index {path} forgets {them}")
        else:
            say(f"{files} gone; --delete forgets {them}")
    say_first(
        "skipped",
        [f"{location(skipped.path)}: {skipped.reason}" for skipped in report.skipped],
        rest=f"matvit info {shlex.quote(str(path))} --skipped lists what the index keeps of them",
    )
