"""`matvit info`: what a checkpoint or an index is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from matvit_app import services
from matvit_app.cli.index import described
from matvit_app.cli.output import JsonFlag, counted, write_json, write_line, write_lines, write_table
from matvit_app.cli.where import typed

_SHOWN = 20  # metadata names that are listed for people; --json lists all


def info(
    target: Annotated[
        str,
        typer.Argument(metavar="[CHECKPOINT|INDEX]", help="A bundled name, a checkpoint folder, a hub id, an index."),
    ] = services.DEFAULT_CHECKPOINT,
    *,
    skipped: Annotated[
        bool, typer.Option("--skipped", help="List the files of an index that are no pictures.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show what an index holds, or what an encoder's submodels cost.

    \b
    Examples:
      matvit info photos.index
      matvit info photos.index --skipped
      matvit info matvit-small
    """
    # The encoder of an index is part of the document, but not worth the seconds that people would wait for it.
    is_index = services.is_index(Path(target))
    found = services.contents_of(target) if is_index and not json else services.info_of(target)
    files = found.pop("skipped_files", [])
    if json:
        write_json(found | {"skipped_files": files} if skipped else found)
    elif is_index:
        _show_index(found, files if skipped else [])
    else:
        _show_encoder(found)


def _show_index(found: dict[str, Any], skipped: list[dict[str, str]]) -> None:
    size = found["bytes"]
    space = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    write_line(f"{found['path']}: {counted(found['items'], 'picture')}, {space}, {described(found)}")
    fields = [f"{name}: {field['pictures']} pictures, {_values(field)}" for name, field in found["metadata"].items()]
    write_lines(fields, of="metadata names", most=_SHOWN)
    for reason, count in found["skipped_reasons"].items():
        write_line(f"skipped {count}: {reason}")
    for file in skipped:
        write_line(f"skipped {file['path']}: {file['reason']}")
    gallery = found["gallery"]
    write_line(
        f"encoder {found['encoder']}, {gallery['spec']} on pictures of {gallery['resolution']} px, "
        f"{found['embedding_dim']} numbers a picture"
    )
    if gallery["source"] is not None:
        write_line(f"submodels that can search it: matvit info {shlex.quote(gallery['source'])}")


def _values(field: dict[str, Any]) -> str:
    """What pictures have under a metadata name, in short."""
    if field["range"] and all(isinstance(one["value"], float | int) for one in field["common"]):
        return " to ".join(map(_number, field["range"]))
    common = [f"{typed(one['value'])} ({one['pictures']})" for one in field["common"]]
    count = counted(field["values"], "value")
    return f"{count}{', most often' if field['values'] > len(common) else ':'} {', '.join(common)}" if common else count


def _number(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # a whole number of hundreds of digits
        return f"{Decimal(value):.6g}"


def _show_encoder(found: dict[str, Any]) -> None:
    write_line(f"encoder {found['encoder']}, {found['embedding_dim']} numbers a picture")
    write_line(f"space {found['space_id']}")
    write_line(f"cut along: {', '.join(found['axes'])}")
    measures = sorted({key for submodel in found["submodels"] for key in submodel["quality"]})
    rows = [
        [
            submodel["spec"],
            f"{submodel['relative_flops']:.0%}",
            f"{submodel['flops'] / 1e9:.2f} G",
            f"{submodel['params'] / 1e6:.2f} M",
            *(_measure(submodel["quality"].get(key)) for key in measures),
        ]
        for submodel in found["submodels"]
    ]
    caption = f"{', '.join(measures)}: {_source(found['submodels'])}" if measures else ""
    write_table(["submodel", "share", "FLOPs", "parameters", *measures], rows, caption=caption)


def _source(submodels: Sequence[Mapping[str, Any]]) -> str:
    """What the rows say that they were measured with."""
    pictures = {one["measured"].get("queries") for one in submodels if isinstance(one.get("measured"), dict)}
    if len(pictures) == 1 and None not in pictures:
        return f"measured on the pictures of {pictures.pop()}. Yours may be easier or harder."
    return "measured on the pictures of whoever made the encoder, not on yours."


def _measure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else ""
