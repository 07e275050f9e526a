"""`matvit info`: what a checkpoint or an index is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from matvit_app import services
from matvit_app.cli.index import described
from matvit_app.cli.output import JsonFlag, write_json, write_line, write_table

_SOURCE = "measured on its validation pictures when the encoder was trained (see its training.json), not on yours."


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
    """Show what an encoder's submodels cost, or what an index holds.

    \b
    Examples:
      matvit info
      matvit info photos.index
      matvit info photos.index --skipped
    """
    found = services.info_of(target)
    files = found.pop("skipped_files", [])
    if json:
        write_json(found | {"skipped_files": files} if skipped else found)
    else:
        _show(found, files if skipped else [])


def _show(found: dict[str, Any], skipped: list[dict[str, str]]) -> None:
    if "items" in found:
        write_line(
            f"{found['path']}: {found['items']} pictures, {found['bytes'] / 1e6:.1f} MB, "
            f"{described(found)}, generation {found['generation']}"
        )
        for reason, count in found["skipped_reasons"].items():
            write_line(f"skipped {count}: {reason}")
        for file in skipped:
            write_line(f"skipped {file['path']}: {file['reason']}")
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
    caption = f"{', '.join(measures)}: {_SOURCE}" if measures else ""
    write_table(["submodel", "share", "FLOPs", "parameters", *measures], rows, caption=caption)


def _measure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else ""
