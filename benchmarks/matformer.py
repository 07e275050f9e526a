"""The paper at small scale: one nested ViT against four that were trained independently, on Tiny-ImageNet from scratch.

    python benchmarks/matformer.py --out runs/matformer [--epochs 12] [--json]    # some minutes on one GPU

Equal budgets: every step of the nested encoder trains S, M, L and XL on the same pictures, and the four independent
encoders have as many steps each; together they cost what the nested one does. Measured on the val split: accuracy of
the trained classifier, 1-NN recall with queries and gallery of the same encoder, and against XL's gallery
(leave-one-out), and how often small and large give the same class (the paper's consistency).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import embed

from matvit import MatViT
from matvit.datasets import LabelledImages, data_folder, read_dataset
from matvit.metrics import IntArray, top_k
from matvit.preprocess import FloatArray
from matvit.spec import Granularity
from matvit.training.loop import train
from matvit.training.recipe import Recipe

TRAIN, VAL = "tiny-imagenet/train", "tiny-imagenet/val"
SHARE = {"S": 0.5, "M": 1.0, "L": 2.0, "XL": 4.0}  # hidden width of a feed-forward layer, in embedding widths
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3}
BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one encoder says of the N pictures of the val split."""

    embeddings: FloatArray  # (N, D)
    classes: IntArray  # (N,) the class that its classifier gives


def recipe(name: str, *, ratio: float, nested: bool, steps: int, batch: int) -> Recipe:
    """A run from random weights; `ratio`: hidden width of the feed-forward layers, in embedding widths."""
    losses = {"classification": 1.0}
    stage: dict[str, Any] = {"name": "scratch", "steps": steps, "learning_rate": 1.5e-3, "full": losses}
    if nested:
        stage |= {"submodels": losses, "fixed": ["S", "M", "L"], "sampled": 0}
    return Recipe.model_validate(
        {
            "name": name,
            "compile": True,
            "storage": "float32",
            "encoder": {
                "timm_model": "vit_tiny_patch16_224",
                "model_args": SIZES | {"mlp_ratio": ratio},
                "image_size": SIZES["img_size"],
            },
            "optimiser": {"layer_decay": 1.0, "head_rate": 1.0},
            "data": [{"path": TRAIN, "resolution": 64, "batch": batch}],
            "stages": [stage | {"augmentation": {"mixup_alpha": 0.2}}],
        }
    )


def answers(model: MatViT, spec: str, prototypes: torch.Tensor, pictures: LabelledImages) -> Answers:
    """Embed the val split with the submodel `spec` and ask the trained classifier."""
    embeddings = embed(model, spec, pictures)
    directions = torch.nn.functional.normalize(prototypes.float(), dim=-1).cpu().numpy()
    return Answers(embeddings=embeddings, classes=(embeddings @ directions.T).argmax(axis=1))


def nearest(queries: FloatArray, gallery: FloatArray, labels: IntArray) -> float:
    """Recall@1 in percent of each row against all other rows' gallery embeddings."""
    own = np.arange(len(labels))[:, None]
    hits = top_k(queries, gallery, 1, exclude=own)[1][:, 0]
    return float(100 * (labels[hits] == labels).mean())


def run(out: Path, *, name: str, ratio: float, nested: bool, steps: int, batch: int) -> tuple[MatViT, torch.Tensor]:
    """The trained encoder and its classifier's prototypes (C, D); a run that is complete is not done again."""
    model = train(recipe(name, ratio=ratio, nested=nested, steps=steps, batch=batch), out=out / name)
    state = torch.load(out / name / "state.pt", map_location="cpu", weights_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), state["heads"]["classes.0.prototypes"]


def measure(out: Path, *, steps: int, batch: int, pictures: LabelledImages) -> list[dict[str, Any]]:
    """One row for each granularity, nested beside independent."""
    model, prototypes = run(out, name="nested", ratio=4.0, nested=True, steps=steps, batch=batch)
    nested = {size: answers(model, size, prototypes, pictures) for size in SHARE}
    flops = {size: model.flops(size) / model.flops() for size in SHARE}
    alone = {}
    for size, ratio in SHARE.items():
        own, prototypes = run(out, name=f"alone-{size}", ratio=ratio, nested=False, steps=steps, batch=batch)
        alone[size] = answers(own, Granularity.XL, prototypes, pictures)
    labels = pictures.labels
    return [
        {
            "encoder": size,
            "flops": round(flops[size], 3),
            **{
                f"{kind} {what}": round(value, 1)
                for kind, group in (("nested", nested), ("alone", alone))
                for what, value in (
                    ("accuracy", float(100 * (group[size].classes == labels).mean())),
                    ("1-NN", nearest(group[size].embeddings, group[size].embeddings, labels)),
                    ("1-NN in XL's gallery", nearest(group[size].embeddings, group["XL"].embeddings, labels)),
                    ("same class as XL", float(100 * (group[size].classes == group["XL"].classes).mean())),
                )
            },
        }
        for size in SHARE
    ]


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the five runs")
    parser.add_argument("--epochs", type=float, default=12, help="passes over the training pictures")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures in a step")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pictures = read_dataset(data_folder() / VAL)
    count = len(read_dataset(data_folder() / TRAIN).labels)
    steps = max(1, round(arguments.epochs * count / arguments.batch))
    rows = measure(arguments.out, steps=steps, batch=arguments.batch, pictures=pictures)
    if arguments.json:
        print(json.dumps({"steps": steps, "batch": arguments.batch, "rows": rows}, indent=2))
        return
    print(f"{steps} steps of {arguments.batch} pictures each\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
