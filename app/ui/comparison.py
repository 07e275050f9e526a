"""One query by the chosen submodel and by the full encoder: the two answers, and what each took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matvit.preprocess import ImageSource
from matvit.spec import SubmodelSpec
from retrieval.retriever import Retriever
from retrieval.types import Hit, Hits

DEPTH = 10  # hits that the two answers are compared on
_TIMED = 5  # searches of which the one with the median time is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The answer of one submodel, beside the full encoder's to the same query."""

    hits: tuple[Hit, ...]  # what is shown, best first
    answer: Hits  # of the submodel: its spec, runtime, and the latency of the median search
    full: Hits  # of XL; `answer` itself when XL was chosen
    same: int  # of the first `depth` hits, those that XL has among its own
    depth: int  # DEPTH, or fewer in a smaller index
    strange: frozenset[int]  # ids among the first `depth` hits that XL does not have there


def compare(
    retriever: Retriever, query: ImageSource, *, encoder: SubmodelSpec, k: int, leave_out: Path | None = None
) -> Comparison:
    """The first `k` hits of `encoder`, their agreement with XL's first ten, and both latencies.

    `leave_out`: a picture that is not to be found, the query's own file. Raises what `Retriever.search` raises.
    """
    full_spec = encoder.shape.spec()
    specs = list(dict.fromkeys([encoder, full_spec]))
    wanted = max(k, DEPTH) + (leave_out is not None)
    runs: dict[SubmodelSpec, list[Hits]] = {spec: [] for spec in specs}
    # Each spec's first search extracts the submodel and warms it up: not counted. They take turns, so
    # that neither meets a busier machine.
    for number in range(1 + _TIMED):
        for spec in specs:
            hits = retriever.search(query, encoder=spec, k=wanted)
            if number:
                runs[spec].append(hits)
    answer, full = _median(runs[encoder]), _median(runs[full_spec])
    found, best = _without(answer, leave_out), _without(full, leave_out)
    first = {hit.id for hit in found[:DEPTH]}
    strange = frozenset(first - {hit.id for hit in best[:DEPTH]})
    return Comparison(
        hits=found[:k],
        answer=answer,
        full=full,
        same=len(first) - len(strange),
        depth=len(first),
        strange=strange,
    )


def _median(runs: list[Hits]) -> Hits:
    return sorted(runs, key=lambda hits: hits.latency_ms.total)[len(runs) // 2]


def _without(hits: Hits, path: Path | None) -> tuple[Hit, ...]:
    return tuple(hit for hit in hits if hit.path != path)
