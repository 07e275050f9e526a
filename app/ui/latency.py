"""The bar of where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrieval.types import Hits

if TYPE_CHECKING:
    import altair as alt

STEPS = ("preprocess", "encode", "search")
_COLOURS = ("#d97706", "#0d9488", "#7c83db")  # readable on white and on black


def latency_chart(answers: list[Hits]) -> alt.Chart:
    """One stacked bar for each answer, in ms, named by its spec."""
    import altair as alt

    rows = [
        {"encoder": hits.spec, "step": step, "ms": round(getattr(hits.latency_ms, step), 2), "order": order}
        for hits in answers
        for order, step in enumerate(STEPS)
    ]
    return (
        alt.Chart(alt.Data(values=rows), height=alt.Step(30))
        .mark_bar(size=20)
        .encode(
            x=alt.X("ms:Q", stack=True, title="ms"),
            y=alt.Y("encoder:N", sort=[hits.spec for hits in answers], title=None),
            color=alt.Color(
                "step:N",
                scale=alt.Scale(domain=list(STEPS), range=list(_COLOURS)),
                legend=alt.Legend(orient="top", title=None),
            ),
            order=alt.Order("order:Q"),
            tooltip=["encoder:N", "step:N", alt.Tooltip("ms:Q", format=".1f")],
        )
    )
