"""The plane of FLOPs and recall as one HTML page that asks nothing of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import vl_convert  # noqa: F401  altair puts the drawing library into the page by it: missed before the work

from matvit_app.evaluation import Evaluation

_UNIFORM, _NAMED, _HEURISTIC, _RANDOM = "uniform", "named", "mixed, as the paper advises", "mixed, any order"
_MARK = '<meta name="generator" content="matvit eval --plot">'  # a page of ours may be replaced
_LINES = {_UNIFORM: [6, 4], "front": [2, 2]}  # dashes


def plane_html(found: Evaluation) -> str:
    """A page that draws every query spec by FLOPs (of XL) and recall@1 in the first gallery.

    With it, the line between the uniform granularities and the Pareto front. The drawing library is part of the page.
    """
    rows = _rows(found)
    title = f"{found.result.queries} in {found.result.gallery}, gallery {found.gallery}"
    plane = alt.Chart().encode(
        x=alt.X("flops:Q", title="FLOPs, of XL").axis(format="%"),
        y=alt.Y("recall:Q", title="recall@1").axis(format="%").scale(zero=False),
    )
    ways = {_UNIFORM: {row["spec"] for row in rows if row["kind"] == _UNIFORM}, "front": set(found.front)}
    lines = [
        plane.properties(data=alt.Data(values=[row for row in rows if row["spec"] in specs])).mark_line(
            color="#888888", strokeDash=_LINES[way]
        )
        for way, specs in ways.items()
    ]
    dots = (
        plane.properties(data=alt.Data(values=rows))
        .mark_point(filled=True, size=60)
        .encode(color=alt.Color("kind:N", title=None), tooltip=["spec:N", "kind:N", "flops:Q", "recall:Q"])
    )
    chart = alt.layer(*lines, dots).properties(
        title=alt.Title(
            title.replace("</", "< /"),  # a folder's name must not end the page's script
            subtitle="dashed: between uniform granularities; dotted: the Pareto front",
        ),
        width=720,
        height=480,
    )
    page: str = chart.to_html(inline=True)
    return page.replace("<head>", f"<head>{_MARK}", 1)


def is_plane(path: Path) -> bool:
    """Whether the file is such a page."""
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1000)


def _rows(found: Evaluation) -> list[dict[str, Any]]:
    kinds = dict.fromkeys(found.result.matrix, _NAMED)
    if found.mixed is not None:
        kinds |= {str(spec): _UNIFORM for spec in found.mixed.uniform}
        kinds |= {str(spec): _HEURISTIC for spec in found.mixed.heuristic}
        kinds |= {str(spec): _RANDOM for spec in found.mixed.random}
    full = found.result.flops[found.result.reference[0]]
    return [
        {"spec": spec, "kind": kind, "flops": found.result.flops[spec] / full, "recall": found.recall[spec]}
        for spec, kind in kinds.items()
    ]
