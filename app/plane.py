"""The plane of FLOPs and recall as one HTML page that needs neither a plotting package nor the network: an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from matvit_app.evaluation import Evaluation

_UNIFORM, _NAMED, _HEURISTIC, _RANDOM = "uniform", "named", "mixed, as the paper advises", "mixed, any order"
_COLOURS = {_RANDOM: "#b0b0b0", _HEURISTIC: "#2ca02c", _NAMED: "#1f77b4", _UNIFORM: "#d62728"}  # the last on top
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 790, 60, 540  # pixels: the sides of the plane
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
</head>
<body>
<svg viewBox="0 0 1000 600" width="1000" font-family="sans-serif" font-size="13">
{drawn}
</svg>
</body>
</html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dot:
    spec: str
    kind: str
    flops: float  # share of XL's
    recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """Where FLOPs and recall lie on the page."""

    flops: list[float]  # ticks, rising
    recall: list[float]

    def at(self, flops: float, recall: float) -> tuple[str, str]:
        """Pixels from the left and from the top."""
        across = (flops - self.flops[0]) / (self.flops[-1] - self.flops[0])
        up = (recall - self.recall[0]) / (self.recall[-1] - self.recall[0])
        return f"{_LEFT + across * (_RIGHT - _LEFT):.1f}", f"{_BOTTOM - up * (_BOTTOM - _TOP):.1f}"

    def axes(self) -> Iterator[str]:
        """Ticks, their percentages and what they are of."""
        for flops in self.flops:
            x, _ = self.at(flops, 0)
            yield f'<path d="M{x} {_TOP}V{_BOTTOM}" stroke="#eeeeee"/>'
            yield _text(x, _BOTTOM + 20, f"{flops:.0%}", anchor="middle")
        for recall in self.recall:
            _, y = self.at(0, recall)
            yield f'<path d="M{_LEFT} {y}H{_RIGHT}" stroke="#eeeeee"/>'
            yield _text(_LEFT - 8, float(y) + 4, f"{100 * recall:.3g}%", anchor="end")
        yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 45, "FLOPs, of XL", anchor="middle")
        yield _text(_LEFT, _TOP - 15, "recall@1", anchor="middle")

    def line(self, dots: Iterable[_Dot], *, dashes: str) -> str:
        """Through the dots, the cheapest first."""
        points = " ".join(",".join(self.at(dot.flops, dot.recall)) for dot in sorted(dots, key=lambda dot: dot.flops))
        return f'<polyline points="{points}" fill="none" stroke="#888888" stroke-dasharray="{dashes}"/>'

    def dot(self, dot: _Dot) -> str:
        """It tells its figures when it is pointed at."""
        x, y = self.at(dot.flops, dot.recall)
        told = escape(f"{dot.spec}: {dot.flops:.1%} of the FLOPs, recall@1 {dot.recall:.1%}")
        return f'<circle cx="{x}" cy="{y}" r="4" fill="{_COLOURS[dot.kind]}"><title>{told}</title></circle>'


def plane_html(found: Evaluation) -> str:
    """A page that draws every query spec by FLOPs (of XL) and recall@1 in the first gallery.

    With it, the line between the uniform granularities and the Pareto front.
    """
    title = f"{found.result.queries} in {found.result.gallery}, gallery {found.gallery}"
    dots = sorted(_dots(found), key=lambda dot: list(_COLOURS).index(dot.kind))
    plane = _Plane(flops=_ticks([0, 1, *(dot.flops for dot in dots)]), recall=_ticks([dot.recall for dot in dots]))
    drawn = [
        _text(_LEFT, 20, title),
        *plane.axes(),
        plane.line([dot for dot in dots if dot.kind == _UNIFORM], dashes="6 4"),
        plane.line([dot for dot in dots if dot.spec in set(found.front)], dashes="2 2"),
        *map(plane.dot, dots),
        *_legend(dots),
    ]
    return _PAGE.format(title=escape(title), drawn="\n".join(drawn))


def _dots(found: Evaluation) -> list[_Dot]:
    kinds = dict.fromkeys(found.result.matrix, _NAMED)
    if found.mixed is not None:
        kinds |= {str(spec): _UNIFORM for spec in found.mixed.uniform}
        kinds |= {str(spec): _HEURISTIC for spec in found.mixed.heuristic}
        kinds |= {str(spec): _RANDOM for spec in found.mixed.random}
    full = found.result.flops[found.result.reference[0]]
    return [
        _Dot(spec=spec, kind=kind, flops=found.result.flops[spec] / full, recall=found.recall[spec])
        for spec, kind in kinds.items()
    ]


def _ticks(values: Iterable[float]) -> list[float]:
    """Round numbers at equal distances, five to twelve of them, around all values."""
    low, high = min(values), max(values)
    rough = max(high - low, 0.01) / 8
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _legend(dots: Iterable[_Dot]) -> Iterator[str]:
    rows = [kind for kind in _COLOURS if kind in {dot.kind for dot in dots}]
    for number, kind in enumerate(rows):
        yield f'<circle cx="{_RIGHT + 20}" cy="{_TOP + 20 * number}" r="4" fill="{_COLOURS[kind]}"/>'
        yield _text(_RIGHT + 32, _TOP + 20 * number + 4, kind)
    for number, line in enumerate(
        ("dashed: between uniform", "granularities", "dotted: the Pareto front"), len(rows) + 1
    ):
        yield _text(_RIGHT + 20, _TOP + 20 * number, line)


def _text(x: float | str, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
