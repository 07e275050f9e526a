"""`matvit demo`: the bundled photographs, one index, four query encoders."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli import app as page
from matvit_app.cli.output import JsonFlag, say, write_json, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit_app.demo import DemoTable


def demo(
    *,
    no_app: Annotated[bool, typer.Option("--no-app", help="Stop after the table.")] = False,
    host: page.Host = page.HOST,
    port: page.Port = page.PORT,
    no_browser: page.NoBrowser = False,
    json: JsonFlag = False,
) -> None:
    """Index the bundled photographs, search them at four costs, open the page.

    The full encoder makes the index; S, M, L and XL search it, and a table compares them.

    \b
    Examples:
      matvit demo
      matvit demo --no-app --json
    """
    if not no_app:
        page.check_can_serve(host=host, port=port)
    started = time.monotonic()
    with progress_bar() as progress:
        demo_index, table = services.run_demo(progress=progress)
    seconds = time.monotonic() - started
    if json:
        write_json(
            {
                "index": str(demo_index),
                "photos": table.photos,
                "queries": table.queries,
                "classes": table.classes,
                "runtime": table.runtime,
                "seconds": seconds,
                "submodels": [row.to_json() for row in table.rows],
            }
        )
    else:
        _show(table)
        say(f"{seconds:.0f} s; the index is {demo_index}")
    if not no_app:
        page.serve(demo_index, host=host, port=port, browser=not no_browser, json=False)


def _show(table: DemoTable) -> None:
    rows = [
        [
            row.spec,
            f"{row.relative_flops:.0%}",
            f"{row.params / 1e6:.1f} M",
            f"{row.ms_per_query:.1f}",
            f"{100 * row.recall_at_1:.1f} %",
            f"{100 * row.agreement_at_10:.1f} %",
        ]
        for row in table.rows
    ]
    caption = (
        f"Measured here, just now ({table.runtime}): {table.photos} photographs, indexed once, by XL.\n"
        f"FLOPs: share of XL's. ms per query: median of {table.timed} single queries, from the file to the hits.\n"
        f"recall@1: {table.queries} photographs of {table.classes} classes that our training left out each search all\n"
        "photographs for another one of their class (the start weights and the teacher may know these classes).\n"
        "agreement@10: share of XL's first 10 hits that the submodel finds too."
    )
    columns = ["submodel", "FLOPs", "parameters", "ms per query", "recall@1", "agreement@10"]
    write_table(columns, rows, title="One index, four query encoders", caption=caption)
