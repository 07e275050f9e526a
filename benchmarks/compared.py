"""What was compared on the way to the packaged recipes: each variant is one of them with changes, trained anew.

    python benchmarks/compared.py --out runs/compared [--only NAME ...]     # hours on one GPU; minutes each

Prints a row for each variant: recall@1 in the encoder's own XL gallery, on Caltech's unseen half / groceries in
groceries / groceries in product pictures. Most go on from the run "plain", its units ordered.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controls import Task, found_by, ordered, read_tasks, trained

from matvit import MatViT
from matvit.training.recipe import Recipe, load_recipe

DIAL = ("XL", "XL-r154", "XL-r112", "XL-r98", "XL-r84", "XL-r70", "XL-r56")
CUT = ("L", "M", "S")
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Some stages of a packaged recipe, and what is changed in the first of them."""

    recipe: str = "matvit-small"
    stages: tuple[int, ...]
    after: str | None = None  # PLAIN: goes on from that run; None: from what the recipe says
    change: Mapping[str, Any] = field(default_factory=dict)


def _losses(classification: float, classes: float, features: float) -> Variant:
    weights = {"classification": classification, "teacher_classes": classes, "teacher_features": features}
    return Variant(stages=(0,), change={"full": weights})


def _nested(**change: Any) -> Variant:
    """The second stage, short and not averaged, all submodels in training."""
    return Variant(stages=(1,), after=PLAIN, change={"steps": 330, "average": 1.0} | change)


def _frozen(**change: Any) -> Variant:
    """The third stage, short, in the place of the second: what S, M and L own alone, the full encoder stays."""
    return Variant(stages=(2,), after=PLAIN, change={"steps": 300} | change)


def _joint(average: float) -> Variant:
    """As long as the first stage of matvit-small-longer on its pictures, all weights in training."""
    ladder = (
        "S S M M L L mixed S-r168 M-r168 L-r168 XL-r154 S-r112 M-r112 L-r112 mixed-r112 XL-r112 XL-r112 "
        "XL-d10-r112 XL-r98 L-r98 M-r98 S-r84 M-r84 L-r84 XL-r84 L-d10-r98 XL-d10-r84 M-d10-r84 XL-r70 XL-r56 S-d8-r84 "
        "M-r56 S-d8-r56"
    )
    change = {
        "steps": 600,
        "learning_rate": 4e-4,
        "freeze": False,
        "ladder": tuple(ladder.split()),
        "full": {"cosine": 8, "similarity": 8},
        "average": average,
    }
    return Variant(recipe="matvit-small-longer", stages=(0,), change=change)


LOOSE = {"full": {"cosine": 4, "similarity": 4}, "resolutions": (224, 168, 112, 84)}
CENTRED = {"cosine": 1, "centred": True, "similarity": 2, "contrast": 1}
VARIANTS = {
    # Stage 1, by the weights of classification, the teacher's classes and its features; "plain" has 0.3, 1, 2.
    PLAIN: Variant(stages=(0,)),
    "losses-1-1-1": _losses(1, 1, 1),
    "losses-0-1-2": _losses(0, 1, 2),
    # Stage 2, by its learning rate and how XL is held: by weight 4 at one of four sizes, or 8 at 224 px in every step.
    "rate-8e-4-loose": _nested(learning_rate=8e-4, **LOOSE),
    "rate-8e-4": _nested(learning_rate=8e-4),
    "rate-4e-4": _nested(),
    "centred": _nested(submodels=CENTRED),
    # Stage 2 in full, by how much of its end is taken, and with stage 3.
    **{f"average-{share}": _nested(steps=1300, average=share) for share in (0.5, 0.7, 0.8, 0.9, 1.0)},
    "own": Variant(stages=(1, 2), after=PLAIN),
    # How it grows with minutes: stage 2 ended sooner; "plain" is before it, average-0.8 all of it.
    **{f"steps-{steps}": Variant(stages=(1,), after=PLAIN, change={"steps": steps}) for steps in (330, 650)},
    # XL frozen from stage 1 on: with a least-squares fit, and by the rank of what S, M and L own.
    "frozen": _frozen(),
    "frozen-fit": _frozen(fit=True),
    "frozen-64": _frozen(private=64),
    "frozen-fit-64": _frozen(fit=True, private=64),
    # After all of matvit-small, on more pictures, for equal minutes: XL frozen, or held by an anchor.
    "longer-frozen": Variant(recipe="matvit-small-longer", stages=(0,)),
    "longer-joint": _joint(1.0),
    "longer-joint-0.8": _joint(0.8),
}


def recipe_of(variant: Variant, *, out: Path) -> Recipe:
    """The recipe of a variant, checked; runs are below `out`."""
    fields = load_recipe(variant.recipe).model_dump()
    first, *others = (fields["stages"][index] for index in variant.stages)
    fields |= {"stages": [first | variant.change, *others], "validation": None, "storage": "float32"}
    if variant.after is not None:
        fields |= {"encoder": {"checkpoint": str(out / f"{variant.after}-ordered")}, "teacher": None}
    return Recipe.model_validate(fields)


def run(name: str, *, out: Path) -> MatViT:
    """The variant's encoder; a run that is complete is not done again."""
    variant = VARIANTS[name]
    if variant.after is not None and not (ready := out / f"{variant.after}-ordered").exists():
        ordered(run(variant.after, out=out)).save_pretrained(ready)
    return trained(recipe_of(variant, out=out), out / name)


def row(name: str, *, out: Path, tasks: Mapping[str, Task]) -> list[str]:
    """The variant's row of the table: its name, seconds of optimisation, and recall@1 of each submodel, by task."""
    model = run(name, out=out)
    nested = any(stage.submodels for stage in recipe_of(VARIANTS[name], out=out).stages)
    found = found_by(model, [*DIAL, *(CUT if nested else ())], tasks)
    cells = [" / ".join(f"{100 * right.mean():.1f}" for right in by_task.values()) for by_task in found.values()]
    return [name, f"{model.record['seconds']:.0f}", *cells, *([] if nested else ["" for _ in CUT])]


def main() -> None:
    """Train what is not there yet, and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    tasks = read_tasks()
    header = ["variant", "seconds", *DIAL, *CUT]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name in arguments.only or VARIANTS:
        print("| " + " | ".join(row(name, out=arguments.out, tasks=tasks)) + " |", flush=True)


if __name__ == "__main__":
    main()
