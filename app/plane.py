"""The plane of FLOPs and recall as one HTML page: a Vega-Lite description, so that no plotting package is needed."""

from __future__ import annotations

import html
import json
from typing import Any

from matvit_app.evaluation import Evaluation

_UNIFORM, _NAMED, _HEURISTIC, _RANDOM = "uniform", "named", "mixed, as the paper advises", "mixed, any order"
_LIBRARIES = ("vega@6", "vega-lite@6", "vega-embed@7")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
{scripts}
</head>
<body>
<div id="plane"></div>
<script>vegaEmbed("#plane", {description});</script>
</body>
</html>
"""


def plane_html(found: Evaluation) -> str:
    """A page that draws every query spec by FLOPs (of XL) and recall@1 in the first gallery.

    With it, the line between the uniform granularities and the Pareto front. Browsers fetch Vega from jsdelivr.net.
    """
    title = f"{found.result.queries} in {found.result.gallery}, gallery {found.gallery}"
    scripts = "\n".join(f'<script src="https://cdn.jsdelivr.net/npm/{name}"></script>' for name in _LIBRARIES)
    description = json.dumps(_description(found, title)).replace("</", "<\\/")  # a name must not end the script
    return _PAGE.format(title=html.escape(title), scripts=scripts, description=description)


def _description(found: Evaluation, title: str) -> dict[str, Any]:
    rows = _rows(found)
    position = {
        "x": {"field": "flops", "type": "quantitative", "title": "FLOPs, of XL", "axis": {"format": "%"}},
        "y": {
            "field": "recall",
            "type": "quantitative",
            "title": "recall@1",
            "axis": {"format": "%"},
            "scale": {"zero": False},
        },
    }
    fields = ["spec", "kind", "flops", "recall"]
    dots = {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 60},
        "encoding": {
            **position,
            "color": {"field": "kind", "type": "nominal", "title": None},
            "tooltip": [{"field": field} for field in fields],
        },
    }

    def line(chosen: list[dict[str, Any]], dash: list[int]) -> dict[str, Any]:
        return {
            "data": {"values": chosen},
            "mark": {"type": "line", "color": "#888888", "strokeDash": dash},
            "encoding": position,
        }

    front = [row for row in rows if row["spec"] in set(found.front)]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {
            "text": title,
            "subtitle": "dashed: between uniform granularities; dotted: the Pareto front",
        },
        "width": 720,
        "height": 480,
        "layer": [line([row for row in rows if row["kind"] == _UNIFORM], [6, 4]), line(front, [2, 2]), dots],
    }


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
