"""Beside the nested encoder: small encoders that were trained apart from it, and a plain one cut down.

    python benchmarks/controls.py --out runs/controls [--encoder matvit-small] [--json]     # minutes on one GPU

Trains, with the packaged recipe's pictures, teacher and losses:
  plain        its first stage alone: an encoder that was never nested
  distilled    the plain encoder's S, all its weights free, towards the plain encoder's embeddings: the strongest rival;
               --steps STEPS
  independent  an encoder of S's size, from S's slice of the start weights, by the first stage and another seed;
               --independent STEPS, for as many minutes as the distilled one
  longer       with --longer STEPS: the first stage with so many steps, for as many minutes as the nested encoder
and prints recall@1, queries with a near-copy in the gallery left out, on Caltech's classes that nothing was trained on,
and on the groceries that nothing was chosen on (photographs in photographs, and in product pictures):
  the plain encoder cut along each axis without training (truncated), and after its hidden units were ordered;
  the plain encoders at lower resolutions and with blocks dropped: a dial that needs no nesting;
  the small encoders in the big one's gallery, in their own, and after the best rotation (Procrustes) between the two;
  the nested encoder by the first numbers of its embeddings alone.
In brackets: how many points more the nested encoder finds by the same submodel, with the 95 % bootstrap interval over
the same queries; with short vectors, how many more it finds by whole ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matvit import MatViT
from matvit.datasets import LabelledImages, data_folder, read_dataset
from matvit.errors import DatasetError
from matvit.importance import find_keep_order, order_by_importance
from matvit.metrics import BoolArray, IntArray, bootstrap_intervals, top_k
from matvit.model import AxesConfig
from matvit.near_copies import difference_hash, near_copies
from matvit.preprocess import FloatArray
from matvit.progress import silent
from matvit.streaming import embed_pictures
from matvit.training.loop import train
from matvit.training.recipe import EncoderRecipe, Recipe, load_recipe
from matvit.training.sampling import PREFIXES
from matvit.training.start import start_encoder

DIAL = ("XL", "XL-r168", "XL-r154", "XL-r140", "XL-r126", "XL-r112", "XL-r98", "XL-r84", "XL-r70", "XL-r56")
CUT = ("S", "M", "L")
DROPPED = ("XL-d10", "XL-d10-r112", "XL-d10-r84", "XL-d10-r56")
SEEN = ("caltech-101/train", "0:50")  # training pictures, for ordering and rotating
TASKS = {  # queries, gallery, classes: nothing of them was trained on
    "Caltech": ("caltech-101/test", "caltech-101/train", "50:101"),
    "groceries": ("grocery-store/test", "grocery-store/train", None),
    "products": ("grocery-store/test", "grocery-store/iconic", None),
}
ORDER_PICTURES = 256

Right = dict[str, BoolArray]  # by task (Q,): which queries found a picture of their class first


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is searched for in what."""

    queries: LabelledImages
    gallery: LabelledImages
    rows: IntArray  # (Q,) of the queries: those with their class in the gallery, but no near-copy

    def right(self, asked: FloatArray, found: FloatArray) -> BoolArray:
        """(Q, D), (M, D) -> (Q,): the nearest picture of the gallery is of the query's class."""
        hits = top_k(asked, found, 1)[1][:, 0]
        return np.asarray(names(self.gallery)[hits] == names(self.queries)[self.rows])


def read_tasks(tasks: Collection[str] = TASKS) -> dict[str, Task]:
    """All of `TASKS`, or some."""
    read = {
        name: (read_pictures(queries, only), read_pictures(gallery, only))
        for name, (queries, gallery, only) in TASKS.items()
        if name in tasks
    }
    return {
        name: Task(queries=queries, gallery=gallery, rows=rows_to_ask(queries, gallery))
        for name, (queries, gallery) in read.items()
    }


def read_pictures(path: str, classes: str | None = None) -> LabelledImages:
    """A public data set, or some of its classes."""
    return read_dataset(data_folder() / path, classes=classes)


def names(images: LabelledImages) -> np.ndarray:
    """(N,) the class name of each picture."""
    return np.array(images.class_names)[images.labels]


def rows_to_ask(queries: LabelledImages, gallery: LabelledImages) -> IntArray:
    """The queries that `matvit eval` counts: with their class in the gallery, but no near-copy of themselves."""
    hashes, theirs = (np.stack([difference_hash(image) for image in one.images]) for one in (queries, gallery))
    return np.flatnonzero(np.isin(names(queries), names(gallery)) & ~near_copies(hashes, theirs))


def plain(recipe: Recipe, out: Path, *, steps: int | None = None) -> MatViT:
    """The recipe's first stage alone, with so many steps (None: its own)."""
    first = recipe.stages[0]
    return trained(recipe, out, stages=(first.model_copy(update={"steps": steps or first.steps}),))


def distilled(recipe: Recipe, out: Path, *, big: Path, steps: int) -> MatViT:
    """S of the ordered checkpoint `big`, all weights free, towards `big`'s XL; its own XL may change as it likes."""
    nested = recipe.stages[1]
    free = {
        "fixed": ("S",),
        "sampled": 0,
        "ladder": ("S",),
        "steps": steps,
        "average": 1.0,
        "full": nested.full.model_copy(update={"cosine": 1e-6, "similarity": 0.0}),
        "resolutions": (56,),  # of its own XL, which nobody asks
    }
    encoder = EncoderRecipe(checkpoint=str(big))
    return trained(recipe, out, stages=(nested.model_copy(update=free),), encoder=encoder)


def independent(recipe: Recipe, out: Path, *, steps: int | None = None) -> MatViT:
    """An encoder of S's size, trained by the first stage as if no other existed, for so many steps (None: its own)."""
    weights = out / "independent-start.safetensors"
    sizes = {"mlp_ratio": slice_of_start(recipe, weights), "img_size": recipe.encoder.image_size}
    encoder = recipe.encoder.model_copy(update={"weights": weights, "model_args": recipe.encoder.model_args | sizes})
    small = recipe.model_copy(update={"seed": recipe.seed + 1, "encoder": encoder})
    return plain(small, out / "independent", steps=steps)


def slice_of_start(recipe: Recipe, path: Path) -> float:
    """Save S of the ordered start weights as a timm checkpoint; its feed-forward width, in embedding widths."""
    from safetensors.torch import save_file

    model = start_encoder(recipe)
    order_by_importance(model, seen_pictures(model))
    small = model.extract("S")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, path)
    return model.shape.spec("S").widths[0] / model.embedding_dim


def trained(recipe: Recipe, out: Path, **changes: Any) -> MatViT:
    """What the recipe with these changes gives, in float32; a run that is complete is not done again."""
    model = train(recipe.model_copy(update={"validation": None, "storage": "float32", **changes}), out=out)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def seen_pictures(model: MatViT) -> torch.Tensor:
    """Some training pictures as the encoder takes them: (B, 3, R, R) on its device."""
    seen = read_pictures(*SEEN)
    rows = np.linspace(0, len(seen.labels) - 1, ORDER_PICTURES).astype(int)
    pixels = model.encoder("XL").preprocess([seen.images[row] for row in rows])
    return torch.from_numpy(pixels).to(model.device)


def embed(model: MatViT, spec: str, pictures: LabelledImages, rows: IntArray | None = None) -> FloatArray:
    """(N, D) of unit length: all pictures, or those at `rows`. Raises DatasetError where one cannot be read."""
    return embed_by(model, [spec], pictures, rows)[spec]


def embed_by(
    model: MatViT, specs: Sequence[str], pictures: LabelledImages, rows: IntArray | None = None
) -> dict[str, FloatArray]:
    """The same by several submodels: each picture is decoded once for each resolution."""
    encoders = {spec: model.encoder(spec) for spec in specs}
    found = embed_pictures(
        pictures,
        np.arange(len(pictures.labels)) if rows is None else rows,
        encoders={encoder.spec: encoder for encoder in encoders.values()},
        hashing=False,
        batch_size=256,
        stage="embed",
        progress=silent,
    )
    if found.skipped:  # or rows would no longer be the labels'
        raise DatasetError(
            what=f"{len(found.skipped)} pictures cannot be read ({found.skipped[0].path}: {found.skipped[0].reason})",
            where=pictures.name,
            fix="mend them, or fetch the data set again",
        )
    return {spec: found.vectors[encoder.spec] for spec, encoder in encoders.items()}


def rotation(source: FloatArray, target: FloatArray) -> FloatArray:
    """The rotation (D, D) that brings `source` (N, D) nearest to `target` (N, D): orthogonal Procrustes."""
    left, _, right = np.linalg.svd(source.T.astype(np.float64) @ target)
    turn: FloatArray = (left @ right).astype(np.float32)
    return turn


def found_by(model: MatViT, specs: Sequence[str], tasks: Mapping[str, Task]) -> dict[str, Right]:
    """What each spec finds in the encoder's own XL gallery."""
    found: dict[str, Right] = {spec: {} for spec in specs}
    for name, task in tasks.items():
        gallery = embed(model, "XL", task.gallery)
        for spec, asked in embed_by(model, specs, task.queries, task.rows).items():
            found[spec][name] = task.right(asked, gallery)
    return found


def across(small: MatViT, spec: str, big: MatViT, tasks: Mapping[str, Task]) -> dict[str, Right]:
    """What a small encoder finds in the big one's gallery, as it is and rotated, and in its own."""
    seen = read_pictures(*SEEN)
    turn = rotation(embed(small, spec, seen), embed(big, "XL", seen))
    found: dict[str, Right] = {"in the big gallery": {}, "rotated": {}, "in its own": {}}
    for name, task in tasks.items():
        asked, theirs = embed(small, spec, task.queries, task.rows), embed(big, "XL", task.gallery)
        found["in the big gallery"][name] = task.right(asked, theirs)
        found["rotated"][name] = task.right(asked @ turn, theirs)
        found["in its own"][name] = task.right(asked, embed(small, spec, task.gallery))
    return found


def shortened(model: MatViT, tasks: Mapping[str, Task]) -> dict[str, dict[str, Right]]:
    """What XL and S find by the first numbers of queries and gallery alone, scaled to unit length again; by length."""

    def cut(vectors: FloatArray, length: int) -> FloatArray:
        short = vectors[:, :length]
        return short / np.linalg.norm(short, axis=1, keepdims=True)

    found: dict[str, dict[str, Right]] = {f"first {length}": {"XL": {}, "S": {}} for length in PREFIXES}
    for name, task in tasks.items():
        gallery = embed(model, "XL", task.gallery)
        for spec, asked in embed_by(model, ("XL", "S"), task.queries, task.rows).items():
            for length in PREFIXES:
                found[f"first {length}"][spec][name] = task.right(cut(asked, length), cut(gallery, length))
    return found


def ordered(model: MatViT) -> MatViT:
    """The same function, its units sorted by importance and the order of its blocks found; changed in place."""
    pictures = seen_pictures(model)
    order_by_importance(model, pictures)
    keep_order = find_keep_order(model, pictures[:64])
    model.open_axes(AxesConfig(keep_order=keep_order, image_size_step=model.config.patch_size))
    return model


def measure(
    recipe: Recipe, *, encoder: str, out: Path, steps: int, alone: int | None, longer: int | None
) -> dict[str, Any]:
    """Every control beside the nested encoder."""
    tasks = read_tasks()
    nested = MatViT.from_pretrained(encoder).to("cuda" if torch.cuda.is_available() else "cpu")
    ours = found_by(nested, [*DIAL, *DROPPED, *CUT], tasks)
    never = plain(recipe, out / "plain")
    truncated = found_by(never, CUT, tasks)
    ordered(never).save_pretrained(out / "ordered")
    dial = found_by(never, [*DIAL, *DROPPED, *CUT], tasks)
    rival = distilled(recipe, out / "distilled", big=out / "ordered", steps=steps)
    apart = independent(recipe, out, steps=alone)
    small = across(nested, "S", nested, tasks)
    found = {
        "nested": rows(ours),
        "truncated": rows(truncated, ours),
        "ordered, truncated": rows({spec: dial[spec] for spec in CUT}, ours),
        "never nested": rows({spec: dial[spec] for spec in (*DIAL, *DROPPED)}, ours),
        "small encoders: nested": rows(small),
        "small encoders: distilled": rows(across(rival, "S", never, tasks), small),
        "small encoders: independent": rows(across(apart, "XL", nested, tasks), small),
        **{f"nested, by the {length} numbers": rows(part, ours) for length, part in shortened(nested, tasks).items()},
    }
    trained = {"plain": never, "distilled": rival, "independent": apart}
    if longer is not None:
        trained["longer"] = plain(recipe, out / "longer", steps=longer)
        dial = found_by(ordered(trained["longer"]), [*DIAL, *DROPPED], tasks)
        found["never nested, longer"] = rows(dial, ours)
    return {"seconds": {name: model.record["seconds"] for name, model in trained.items()}, "tables": found}


def rows(found: Mapping[str, Right], ours: Mapping[str, Right] | None = None) -> dict[str, dict[str, Any]]:
    """By row and task: recall@1 in percent, and how many points more `ours` finds, with the paired 95 % interval."""
    return {
        row: {task: _cell(right, None if ours is None else ours[row][task]) for task, right in by_task.items()}
        for row, by_task in found.items()
    }


def _cell(right: BoolArray, ours: BoolArray | None) -> dict[str, Any]:
    cell: dict[str, Any] = {"recall@1": round(float(100 * right.mean()), 1)}
    if ours is not None:
        more = 100.0 * (ours.astype(float) - right)
        cell["nested finds more"] = [round(float(x), 1) for x in (more.mean(), *bootstrap_intervals(more[:, None])[0])]
    return cell


def show(found: dict[str, Any]) -> None:
    """Markdown tables, one for each control."""
    print("optimisation:", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items()))
    for title, table in found["tables"].items():
        tasks = list(next(iter(table.values())))
        print(f"\n| {title} | " + " | ".join(tasks) + " |\n" + "|---" * (1 + len(tasks)) + "|")
        for row, cells in table.items():
            print(f"| {row} | " + " | ".join(_text(cell) for cell in cells.values()) + " |")


def _text(cell: dict[str, Any]) -> str:
    more = cell.get("nested finds more")
    return f"{cell['recall@1']}" + (f" ({more[0]:+.1f}, {more[1]:+.1f} to {more[2]:+.1f})" if more else "")


def main() -> None:
    """Train what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--encoder", default="matvit-small", help="the nested encoder to stand beside")
    parser.add_argument("--recipe", default="matvit-small", help="the recipe that made it")
    parser.add_argument("--steps", type=int, default=1000, help="of the distilled encoder")
    parser.add_argument("--independent", type=int, metavar="STEPS", help="of the independent one, if not the stage's")
    parser.add_argument("--longer", type=int, metavar="STEPS", help="also a plain encoder of so many steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(
        load_recipe(arguments.recipe),
        encoder=arguments.encoder,
        out=arguments.out,
        steps=arguments.steps,
        alone=arguments.independent,
        longer=arguments.longer,
    )
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
