"""Beside the nested encoder: small encoders that were trained apart from it, and a plain one cut down.

    python benchmarks/controls.py --out runs/controls [--encoder matvit-small] [--json]     # minutes on one GPU

Trains, with the packaged recipe's pictures, teacher and losses:
  plain        its first stage alone: an encoder that was never nested
  distilled    the plain encoder's S, all its weights free, towards the plain encoder's embeddings: the strongest rival
  independent  an encoder of S's size, from S's slice of the start weights, by the first stage and another seed
  longer       with --longer STEPS: the first stage with so many steps, for as many minutes as the nested encoder
and prints recall@1 on Caltech's classes that nothing was trained on, queries with a near-copy in the gallery left out:
  the plain encoder cut along each axis without training (truncated), and after its hidden units were ordered;
  the plain encoders at lower resolutions and with blocks dropped: a dial that needs no nesting;
  the small encoders in the big one's gallery, in their own, and after the best rotation (Procrustes) between the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matvit import MatViT
from matvit.datasets import LabelledImages, data_folder, read_dataset
from matvit.evaluation import cross_test
from matvit.importance import find_keep_order, order_by_importance
from matvit.metrics import IntArray, top_k
from matvit.model import AxesConfig
from matvit.near_copies import difference_hash, near_copies
from matvit.preprocess import FloatArray
from matvit.progress import silent
from matvit.streaming import embed_pictures
from matvit.training.loop import train
from matvit.training.recipe import EncoderRecipe, Recipe, load_recipe
from matvit.training.start import start_encoder

DIAL = ("XL", "XL-r168", "XL-r154", "XL-r140", "XL-r126", "XL-r112", "XL-r98", "XL-r84", "XL-r70", "XL-r56")
CUT = ("S", "M", "L")
DROPPED = ("XL-d10", "XL-d10-r112", "XL-d10-r84", "XL-d10-r56")
QUERIES, GALLERY, UNSEEN, SEEN = "caltech-101/test", "caltech-101/train", "50:101", "0:50"
ORDER_PICTURES = 256


def caltech(path: str, classes: str) -> LabelledImages:
    """Pictures of Caltech-101."""
    return read_dataset(data_folder() / path, classes=classes)


def plain(recipe: Recipe, out: Path, *, steps: int | None = None) -> MatViT:
    """The recipe's first stage alone, with so many steps (None: its own)."""
    first = recipe.stages[0]
    return _trained(recipe, out, stages=(first.model_copy(update={"steps": steps or first.steps}),))


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
    return _trained(recipe, out, stages=(nested.model_copy(update=free),), encoder=encoder)


def independent(recipe: Recipe, out: Path) -> MatViT:
    """An encoder of S's size, trained by the first stage as if no other existed."""
    weights = out / "independent-start.safetensors"
    sizes = {"mlp_ratio": slice_of_start(recipe, weights), "img_size": recipe.encoder.image_size}
    encoder = recipe.encoder.model_copy(update={"weights": weights, "model_args": recipe.encoder.model_args | sizes})
    return _trained(recipe, out / "independent", stages=recipe.stages[:1], seed=recipe.seed + 1, encoder=encoder)


def slice_of_start(recipe: Recipe, path: Path) -> float:
    """Save S of the ordered start weights as a timm checkpoint; its feed-forward width, in embedding widths."""
    from safetensors.torch import save_file

    model = start_encoder(recipe)
    order_by_importance(model, _pictures(model))
    small = model.extract("S")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, path)
    return model.shape.spec("S").widths[0] / model.embedding_dim


def _trained(recipe: Recipe, out: Path, **changes: Any) -> MatViT:
    model = train(recipe.model_copy(update={"validation": None, "storage": "float32", **changes}), out=out)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(model: MatViT) -> torch.Tensor:
    """Some training pictures as the encoder takes them: (B, 3, R, R) on its device."""
    seen = caltech(GALLERY, SEEN)
    rows = np.linspace(0, len(seen.labels) - 1, ORDER_PICTURES).astype(int)
    pixels = model.encoder("XL").preprocess([seen.images[row] for row in rows])
    return torch.from_numpy(pixels).to(model.device)


def recalls(model: MatViT, specs: Sequence[str]) -> dict[str, float]:
    """Recall@1 in percent of each spec in the encoder's own XL gallery."""
    result = cross_test(
        model, caltech(QUERIES, UNSEEN), caltech(GALLERY, UNSEEN), query_specs=specs, gallery_specs=["XL"]
    )
    return {spec: round(100 * result.matrix[str(model.shape.spec(spec))]["XL"]["recall@1"], 1) for spec in specs}


def without_copies(queries: LabelledImages, gallery: LabelledImages) -> IntArray:
    """The queries that have no near-copy in the gallery: those that `recalls` counts."""
    hashes, theirs = (np.stack([difference_hash(image) for image in one.images]) for one in (queries, gallery))
    return np.flatnonzero(~near_copies(hashes, theirs))


def embed(model: MatViT, spec: str, pictures: LabelledImages, rows: IntArray | None = None) -> FloatArray:
    """(N, D) of unit length: all pictures, or those at `rows`."""
    encoder = model.encoder(spec)
    rows = np.arange(len(pictures.labels)) if rows is None else rows
    found = embed_pictures(
        pictures, rows, encoders={encoder.spec: encoder}, hashing=False, batch_size=256, stage=spec, progress=silent
    )
    return found.vectors[encoder.spec]


def rotation(source: FloatArray, target: FloatArray) -> FloatArray:
    """The rotation (D, D) that brings `source` (N, D) nearest to `target` (N, D): orthogonal Procrustes."""
    left, _, right = np.linalg.svd(source.T.astype(np.float64) @ target)
    turn: FloatArray = (left @ right).astype(np.float32)
    return turn


def across(small: MatViT, spec: str, big: MatViT) -> dict[str, float]:
    """Recall@1 in percent of a small encoder: in the big one's gallery, as it is and rotated; in its own."""
    queries, gallery, seen = caltech(QUERIES, UNSEEN), caltech(GALLERY, UNSEEN), caltech(GALLERY, SEEN)
    rows = without_copies(queries, gallery)
    asked, theirs = embed(small, spec, queries, rows), embed(big, "XL", gallery)
    turn = rotation(embed(small, spec, seen), embed(big, "XL", seen))

    def recall(query: FloatArray, found: FloatArray) -> float:
        hits = top_k(query, found, 1)[1][:, 0]
        return round(float(100 * (gallery.labels[hits] == queries.labels[rows]).mean()), 1)

    return {
        "in the big gallery": recall(asked, theirs),
        "rotated": recall(asked @ turn, theirs),
        "in its own": recall(asked, embed(small, spec, gallery)),
    }


def ordered(model: MatViT) -> MatViT:
    """The same function, its units sorted by importance and the order of its blocks found; changed in place."""
    pictures = _pictures(model)
    order_by_importance(model, pictures)
    keep_order = find_keep_order(model, pictures[:64])
    model.open_axes(AxesConfig(keep_order=keep_order, image_size_step=model.config.patch_size))
    return model


def measure(recipe: Recipe, *, encoder: str, out: Path, steps: int, longer: int | None) -> dict[str, Any]:
    """Every control beside the nested encoder, recall@1 in percent."""
    nested = MatViT.from_pretrained(encoder).to("cuda" if torch.cuda.is_available() else "cpu")
    never = plain(recipe, out / "plain")
    truncated = recalls(never, CUT)
    ordered(never).save_pretrained(out / "ordered")
    dial = recalls(never, [*DIAL, *DROPPED, *CUT])
    found: dict[str, Any] = {
        "truncated": truncated,
        "ordered, truncated": {spec: dial[spec] for spec in CUT},
        "never nested": {spec: dial[spec] for spec in (*DIAL, *DROPPED)},
        "nested": recalls(nested, [*DIAL, *DROPPED, *CUT]),
        "small encoders": {
            "distilled": across(distilled(recipe, out / "distilled", big=out / "ordered", steps=steps), "S", never),
            "independent": across(independent(recipe, out), "XL", nested),
            "nested": across(nested, "S", nested),
        },
    }
    if longer is not None:
        found["never nested, longer"] = recalls(ordered(plain(recipe, out / "longer", steps=longer)), [*DIAL, *DROPPED])
    return found


def main() -> None:
    """Train what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--encoder", default="matvit-small", help="the nested encoder to stand beside")
    parser.add_argument("--recipe", default="matvit-small", help="the recipe that made it")
    parser.add_argument("--steps", type=int, default=1000, help="of the distilled encoder")
    parser.add_argument("--longer", type=int, metavar="STEPS", help="also a plain encoder of so many steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    found = measure(
        recipe, encoder=arguments.encoder, out=arguments.out, steps=arguments.steps, longer=arguments.longer
    )
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name:16s} {value}")


if __name__ == "__main__":
    main()
