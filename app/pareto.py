"""The encoders that the page offers: the four named ones, and what the checkpoint's table shows to be better."""

from __future__ import annotations

from collections.abc import Sequence

from matvit import MatViT
from matvit.pareto import EncoderChoice, measured_choices, pareto_front


def encoder_choices(model: MatViT) -> list[EncoderChoice]:
    """S, M, L and XL, then the other rows of the table that no row beats, the costliest first."""
    measured = measured_choices(model)
    named = [str(spec) for spec in model.shape.granularities()]
    every = [
        EncoderChoice(
            spec=spec,
            relative_flops=model.flops(spec) / model.flops(),
            recall=measured[spec].recall if spec in measured else None,
        )
        for spec in dict.fromkeys([*named, *measured])
    ]
    further = [choice for choice in pareto_front(every) if choice.spec not in named]
    return [*every[: len(named)], *sorted(further, key=lambda choice: -choice.relative_flops)]


def bargain(choices: Sequence[EncoderChoice]) -> int:
    """The position of the cheapest one that finds as much as the best but for a point of recall@1; 0 if unmeasured."""
    measured = [(choice.relative_flops, place, choice.recall) for place, choice in enumerate(choices) if choice.recall]
    enough = max((recall for *_, recall in measured), default=0.0) - 0.01
    return min(((flops, place) for flops, place, recall in measured if recall >= enough), default=(0.0, 0))[1]
