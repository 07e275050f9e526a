"""What the closed-form start of private parameters gives, before any training, by rank.

    python benchmarks/fitting.py [--encoder CHECKPOINT] [--ranks 16,64]

Takes an encoder that was never nested (the packaged recipe's start weights, if none is named), orders its units by
importance, and measures S, M and L against the gallery of its own XL, on Caltech's classes that nothing was trained on:
cut, and with private parameters of each rank, fitted on training pictures. Gains are paired with the cut ones, with
95 % bootstrap intervals over the queries. Seconds are the processor's, for the fit alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from controls import CUT, Right, Task, embed, embed_by, read_tasks, rows, seen_pictures

from matvit import MatViT
from matvit.fitting import fit_private
from matvit.importance import order_by_importance
from matvit.preprocess import FloatArray
from matvit.private import PrivateConfig
from matvit.training.recipe import load_recipe
from matvit.training.start import start_encoder

TASK = "Caltech"
GAINED = "nested finds more"  # so `rows` names it; here it is the fitted one


def right(model: MatViT, task: Task, gallery: FloatArray) -> dict[str, Right]:
    """Which queries S, M and L answer rightly from XL's gallery."""
    asked = embed_by(model, CUT, task.queries, task.rows)
    return {spec: {TASK: task.right(vectors, gallery)} for spec, vectors in asked.items()}


def measure(model: MatViT, ranks: list[int]) -> list[dict[str, Any]]:
    """A row for each rank, the first without a fit: recall@1 of S, M, L in percent, and points gained."""
    pictures = seen_pictures(model)
    order_by_importance(model, pictures)
    task = read_tasks((TASK,))[TASK]
    gallery = embed(model, "XL", task.gallery)
    full = task.right(embed(model, "XL", task.queries, task.rows), gallery)
    print(f"XL: {100 * full.mean():.1f}", flush=True)
    cut = right(model, task, gallery)
    table: list[dict[str, Any]] = [{"rank": None} | {spec: cells[TASK] for spec, cells in rows(cut).items()}]
    for rank in ranks:
        model.add_private(PrivateConfig(rank=rank))
        began = time.process_time()
        fit_private(model, pictures)
        seconds = round(time.process_time() - began)
        fitted = right(model, task, gallery)
        gained = {spec: {GAINED: cells[TASK][GAINED]} for spec, cells in rows(cut, fitted).items()}
        found = {spec: cells[TASK] | gained[spec] for spec, cells in rows(fitted).items()}
        table.append({"rank": rank, "seconds": seconds} | found)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """As Markdown."""
    print("| rank | seconds | " + " | ".join(CUT) + " |\n" + "|---" * (2 + len(CUT)) + "|")
    for row in table:
        cells = [str(row["rank"] or "cut alone"), str(row.get("seconds", ""))]
        for spec in CUT:
            text = f"{row[spec]['recall@1']}"
            if GAINED in row[spec]:
                more, low, high = row[spec][GAINED]
                text += f" ({more:+.1f}, {low:+.1f} to {high:+.1f})"
            cells.append(text)
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a checkpoint that was never nested")
    parser.add_argument("--ranks", default="16,64")
    arguments = parser.parse_args()
    recipe = load_recipe("matvit-small")
    model = start_encoder(recipe) if arguments.encoder is None else MatViT.from_pretrained(arguments.encoder)
    show(measure(model, [int(rank) for rank in arguments.ranks.split(",")]))


if __name__ == "__main__":
    main()
