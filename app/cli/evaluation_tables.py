"""The tables of `matvit eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matvit_app.cli.output import say, write_table

if TYPE_CHECKING:
    from matvit.quality import Quality
    from matvit_app.evaluation import Evaluation


def show(found: Evaluation) -> None:
    """Print what each submodel finds, and what was left out."""
    result = found.result
    most = result.flops[result.reference[0]]
    shown = {*found.named, *found.front}
    measures = list(next(iter(next(iter(result.matrix.values())).values())).measures)
    rows = [
        [query, gallery, f"{result.flops[query] / most:.0%}", *_figures(quality)]
        for query, row in result.matrix.items()
        if query in shown
        for gallery, quality in row.items()
    ]
    write_table(
        ["query", "gallery", "FLOPs", *(name.replace("map", "mAP") for name in measures), "loss [95 % interval]"],
        rows,
        title=f"{result.queries} in {result.gallery}",
        caption="FLOPs: of XL. agreement@10: share of XL's first 10 hits also found. "
        "loss: recall@1 of XL minus the query encoder's, in points, over the same queries.",
        text_columns=2,
    )
    _show_mixed(found)
    left_out = {"near-copies": result.near_copies, "queries without a match": result.without_match}
    for name, count in left_out.items():
        if count:
            say(f"{count} {name} left out")
    for skipped in result.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")


def _show_mixed(found: Evaluation) -> None:
    if found.mixed is None:
        return
    points = found.points
    told = found.to_json()["mixed"]
    rows = [
        [name, f"{kind['above_line']} of {kind['specs']}", *(f"{far:+.1f}" for far in kind["distance"].values())]
        for name, kind in (("as the paper advises", told["heuristic"]), ("at random", told["random"]))
        if kind["specs"]
    ]
    write_table(
        ["mixed submodels", "above the line", "mean distance to it", "worst", "best"],
        rows,
        title=f"{len(points)} mixed submodels and the line between the uniform ones",
        caption="distance: recall@1 in points. The table above shows those on the Pareto front.",
    )
    if len(points) < found.mixed.asked:
        say(f"{found.mixed.asked} mixed submodels were asked for, {len(points)} different ones were found")


def _figures(quality: Quality) -> list[str]:
    means = [f"{100 * mean.value:.1f}" for mean in quality.measures.values()]
    loss = quality.loss
    return [*means, f"{loss.value:+.1f} [{loss.low:+.1f}, {loss.high:+.1f}]"]
