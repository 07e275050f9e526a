"""Mix'n'Match: submodels with a granularity of its own for each block, most of them never trained; no torch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any

from matvit.errors import SpecError
from matvit.spec import EncoderShape, Granularity, SubmodelSpec

_SIZES = tuple(Granularity)
_MIXED = re.compile(r"mixed(?P<axes>(-[hdr]\d{1,9})*):(?P<count>\d{1,6})", re.IGNORECASE)
_MOST_ADVISED = 20_000  # specs; encoders of 50 blocks and more have more
_MISSES = 1000  # draws in a row that give nothing new: small encoders have few


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedSpecs:
    """Seeded per-block specs and the uniform ones that they lie between, all alike on the other axes."""

    asked: int
    axes: str  # as in a spec string, for example "-d10-r84"; empty for the full encoder's
    uniform: tuple[SubmodelSpec, ...]  # S, M, L, XL
    heuristic: tuple[SubmodelSpec, ...]  # never smaller with depth, one size up at a time
    random: tuple[SubmodelSpec, ...]  # the others

    @property
    def specs(self) -> tuple[SubmodelSpec, ...]:
        """All mixed ones; fewer than asked where the encoder has no more."""
        return self.heuristic + self.random


def is_mixed(text: str) -> bool:
    """Whether a query spec asks for mixed ones: "mixed:200", "mixed-d10-r84:200"."""
    return text.strip().lower().startswith("mixed")


def mixed_specs(shape: EncoderShape, text: str, *, seed: int = 0) -> MixedSpecs:
    """The specs that "mixed:COUNT" or "mixed-AXES:COUNT" stands for; equal calls give equal specs.

    Half of them follow MatFormer's advice (arXiv 2310.07707, section 3.3), as far as there are so many;
    the other half have the granularities of their blocks drawn in random shares, in any order.
    Raises SpecError for another text, and for axes that the encoder does not have.
    """
    match = _MIXED.fullmatch(text.strip())
    if match is None or int(match["count"]) < 1:
        raise SpecError(
            what=f"'{text}' does not say how many mixed submodels",
            where="encoder spec",
            fix="give a number, for example mixed:200 or mixed-d10-r84:200",
        )
    count, axes = int(match["count"]), match["axes"]
    draw = random.Random(seed)  # noqa: S311  # a seed, not a secret
    uniform = tuple(shape.spec(f"{size}{axes}") for size in _SIZES)
    advised = dict.fromkeys(_spec(shape, sizes, axes) for sizes in _advised(shape.num_blocks, count, draw))
    pool = [spec for spec in advised if spec not in uniform]
    heuristic = tuple(draw.sample(pool, min(len(pool), (count + 1) // 2)))
    others: dict[SubmodelSpec, None] = {}
    missed = 0
    while len(heuristic) + len(others) < count and missed < _MISSES:
        spec = _spec(shape, _drawn(shape.num_blocks, draw), axes)
        missed += 1
        if spec not in uniform and spec not in advised and spec not in others:
            others[spec] = None
            missed = 0
    return MixedSpecs(asked=count, axes=axes, uniform=uniform, heuristic=heuristic, random=tuple(others))


def _spec(shape: EncoderShape, sizes: Sequence[Granularity], axes: str) -> SubmodelSpec:
    return shape.spec(".".join(f"1{size}" for size in sizes) + axes)


def _advised(blocks: int, count: int, draw: random.Random) -> Iterator[list[Granularity]]:
    """Never smaller with depth, and each block at most one size above the one before: the least slope.

    All of them, or `count` random ones where an encoder has very many blocks.
    """
    kinds = [(steps, smallest) for steps in range(1, len(_SIZES)) for smallest in range(len(_SIZES) - steps)]
    have = [comb(blocks - 1, steps) for steps, _ in kinds]
    if sum(have) <= _MOST_ADVISED:
        for steps in range(1, len(_SIZES)):
            for ends in combinations(range(1, blocks), steps):
                for smallest in range(len(_SIZES) - steps):
                    yield _rising(blocks, ends, smallest)
        return
    for steps, smallest in draw.choices(kinds, weights=have, k=count):
        yield _rising(blocks, sorted(draw.sample(range(1, blocks), steps)), smallest)


def _rising(blocks: int, ends: Sequence[int], smallest: int) -> list[Granularity]:
    """One size up after each of `ends`."""
    runs = [end - start for start, end in pairwise((0, *ends, blocks))]
    return [_SIZES[smallest + step] for step, run in enumerate(runs) for _ in range(run)]


def _drawn(blocks: int, draw: random.Random) -> list[Granularity]:
    # Random shares of the sizes (a Dirichlet draw): equal shares would put all specs in the middle of the FLOPs.
    shares = [draw.expovariate(1) for _ in _SIZES]
    return draw.choices(_SIZES, weights=shares, k=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPoint:
    """One mixed spec on the plane of FLOPs and recall."""

    spec: str
    heuristic: bool
    flops: int
    recall: float  # recall@1, 0 to 1
    line: float  # recall of the straight line between the uniform neighbours at these FLOPs

    @property
    def above(self) -> bool:
        """Whether it finds more than the line."""
        return self.recall > self.line

    @property
    def distance(self) -> float:
        """How much more it finds than the line, points."""
        return 100 * (self.recall - self.line)


def against_line(mixed: MixedSpecs, *, recall: Mapping[str, float], flops: Mapping[str, int]) -> list[MixedPoint]:
    """Every mixed spec beside the line through S, M, L and XL; `recall` and `flops` are by spec string."""
    known = [(flops[str(spec)], recall[str(spec)]) for spec in mixed.uniform]
    return [
        MixedPoint(
            spec=str(spec),
            heuristic=spec in mixed.heuristic,
            flops=flops[str(spec)],
            recall=recall[str(spec)],
            line=_interpolated(known, flops[str(spec)]),
        )
        for spec in mixed.specs
    ]


def _interpolated(known: Sequence[tuple[int, float]], at: int) -> float:
    """Linear between the neighbours; `at` lies between the first and the last."""
    for (low, below), (high, above) in pairwise(known):
        if at <= high and high > low:
            return below + (above - below) * (at - low) / (high - low)
    return known[-1][1]


def summary(points: Sequence[MixedPoint], *, asked: int) -> dict[str, Any]:
    """How they lie to the line, by kind, and each point: what `matvit eval --json` prints as "mixed"."""

    def counted(chosen: Sequence[MixedPoint]) -> dict[str, Any]:
        counts = {"specs": len(chosen), "above_line": sum(point.above for point in chosen)}
        far = [point.distance for point in chosen]
        distances = {"mean": sum(far) / len(far), "worst": min(far), "best": max(far)} if far else None
        return counts | {"distance": distances}

    return {
        "asked": asked,
        **counted(points),
        "heuristic": counted([point for point in points if point.heuristic]),
        "random": counted([point for point in points if not point.heuristic]),
        "points": {
            point.spec: {
                "heuristic": point.heuristic,
                "flops": point.flops,
                "recall@1": point.recall,
                "line": point.line,
                "above_line": point.above,
            }
            for point in points
        },
    }
