"""What a checkpoint's table says of its submodels: what each costs, how much it finds, and which nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matvit.encoder import ElasticEncoder
from matvit.metrics import RECALL


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderChoice:
    """One submodel to search with."""

    spec: str
    relative_flops: float  # of XL
    recall: float | None  # recall@1 in the checkpoint's table, in [0, 1]; None: not measured


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


def measured_choices(encoder: ElasticEncoder) -> dict[str, EncoderChoice]:
    """The table's submodels whose recall was measured, by canonical spec.

    The table comes from a file: what is no share is left out.
    """
    choices: dict[str, EncoderChoice] = {}
    for row in encoder.pareto:
        recall = row.get("quality", {}).get(RECALL)
        if recall is None or not 0 <= recall <= 1:
            continue
        spec = str(encoder.shape.spec(row["spec"]))
        choices.setdefault(spec, EncoderChoice(spec=spec, relative_flops=row["relative_flops"], recall=recall))
    return choices
