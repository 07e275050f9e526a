"""The encoder beside the frozen teacher that it learnt from, each in its own gallery: who finds more?

    python benchmarks/teacher.py [--encoder matvit-small] [--recipe matvit-small] [--sizes 224,260] [--json]

Pictures of classes that the encoder was not trained on; the teacher (ImageNet-1k) may have met some of them. Its
embedding is its pooled features; FLOPs are not compared.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from matvit import MatViT
from matvit.datasets import data_folder, read_dataset
from matvit.evaluation import Submodels, cross_test
from matvit.preprocess import Preprocessing
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.torch_encoder import TorchEncoder
from matvit.training.recipe import TeacherRecipe, load_recipe
from matvit.training.start import load_teacher

SETS = (  # queries, gallery, classes
    ("caltech-101/test", "caltech-101/train", "50:101"),
    ("grocery-store/test", "grocery-store/train", None),
    ("grocery-store/test", "grocery-store/iconic", None),
)
MEASURES = ("recall@1", "recall@10", "map@100")


class Features(nn.Module):
    """A timm classifier's pooled features: (B, 3, R, R) -> (B, E)."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        """Not of unit length."""
        pooled: Tensor = self.classifier.forward_head(self.classifier.forward_features(pixels), pre_logits=True)
        return pooled


@dataclass(frozen=True)
class Teacher:
    """The teacher as something with one submodel: itself, at one resolution."""

    encoding: TorchEncoder
    shape: EncoderShape  # stands for it in tables

    def encoder(self, spec: str | SubmodelSpec | None = None) -> TorchEncoder:  # noqa: ARG002
        """The teacher, whatever is asked for."""
        return self.encoding


def teacher_at(recipe: TeacherRecipe, size: int, *, shape: EncoderShape, device: torch.device) -> Teacher:
    """The recipe's teacher on pictures of `size` pixels."""
    features = Features(load_teacher(recipe)).to(device)
    return Teacher(
        TorchEncoder(
            features,
            spec=replace(shape.spec(), image_size=size),
            space_id="teacher",
            embedding_dim=features.classifier.num_features,
            preprocessing=Preprocessing(mean=recipe.mean, std=recipe.std),
        ),
        shape,
    )


def found(encoder: Submodels) -> list[dict[str, float]]:
    """Percent, one row for each data set."""
    rows = []
    for queries, gallery, classes in SETS:
        asked, searched = (read_dataset(data_folder() / one, classes=classes) for one in (queries, gallery))
        test = cross_test(encoder, asked, searched, query_specs=["XL"], gallery_specs=["XL"], batch_size=128)
        rows.append({measure: round(100 * test.matrix["XL"]["XL"][measure], 1) for measure in MEASURES})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="matvit-small")
    parser.add_argument("--recipe", default="matvit-small", help="the recipe that names the teacher")
    parser.add_argument("--sizes", default="224,260", help="resolutions of the teacher, pixels")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe).teacher
    if recipe is None:
        parser.error(f"--recipe {arguments.recipe} names no teacher")
    model = MatViT.from_pretrained(arguments.encoder).to("cuda" if torch.cuda.is_available() else "cpu")
    named: dict[str, Submodels] = {f"{model.name}, XL at {model.config.image_size} px": model}
    for size in map(int, arguments.sizes.split(",")):
        teacher = teacher_at(recipe, size, shape=model.shape, device=model.device)
        named[f"{recipe.timm_model} at {size} px"] = teacher
    table = {name: found(encoder) for name, encoder in named.items()}
    if arguments.json:
        print(json.dumps(table, indent=2))
        return
    for number, (queries, gallery, classes) in enumerate(SETS):
        print(f"\n{queries} in {gallery}" + (f", classes {classes}" if classes else ""))
        for name, rows in table.items():
            print(f"  {name:36s} " + "  ".join(f"{measure} {value}" for measure, value in rows[number].items()))


if __name__ == "__main__":
    main()
