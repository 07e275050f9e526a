"""The encoders that the page offers: the four named ones, and what the checkpoint's table shows to be better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matvit import MatViT, SpecError

RECALL = "recall@1"  # the measure that rows are compared by


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderChoice:
    """One submodel to search with."""

    spec: str
    relative_flops: float  # of XL
    recall: float | None  # recall@1 in the checkpoint's table, in [0, 1]; None: not measured


def encoder_choices(model: MatViT) -> list[EncoderChoice]:
    """S, M, L and XL, then the other rows of the table that no row beats, the costliest first."""
    recall = _measured(model)
    named = [str(spec) for spec in model.shape.granularities()]
    every = [
        EncoderChoice(spec=spec, relative_flops=model.flops(spec) / model.flops(), recall=recall.get(spec))
        for spec in dict.fromkeys([*named, *recall])
    ]
    further = [choice for choice in pareto_front(every) if choice.spec not in named]
    return [*every[: len(named)], *sorted(further, key=lambda choice: -choice.relative_flops)]


def pareto_front(choices: Sequence[EncoderChoice]) -> list[EncoderChoice]:
    """The measured ones whose recall no other reaches at as few FLOPs, the cheapest first; of equals, the first."""
    front: list[EncoderChoice] = []
    best = -1.0
    measured = [(choice, choice.recall) for choice in choices if choice.recall is not None]
    for choice, recall in sorted(measured, key=lambda pair: (pair[0].relative_flops, -pair[1])):
        if recall > best:
            front.append(choice)
            best = recall
    return front


def _measured(model: MatViT) -> dict[str, float]:
    """recall@1 by canonical spec. The table comes from a file: what is no submodel or no share is left out."""
    recall: dict[str, float] = {}
    for row in model.pareto:
        value = row.get("quality", {}).get(RECALL)
        if value is None or not 0 <= value <= 1:
            continue
        try:
            recall.setdefault(str(model.shape.spec(row["spec"])), value)
        except SpecError:
            continue
    return recall
