"""The models that a run starts from: the plain encoder and the frozen teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matvit.errors import RecipeError
from matvit.model import MatViT
from matvit.training.recipe import Recipe, TeacherRecipe


def start_encoder(recipe: Recipe) -> MatViT:
    """The recipe's plain encoder as a MatViT, all weights float32 and trainable.

    Raises RecipeError when its weights cannot be read, BackboneError when it cannot be made elastic.
    """
    start = recipe.encoder
    if start.weights is None:
        model = MatViT.from_timm(start.timm_model, pretrained=start.pretrained, image_size=start.image_size)
    else:
        vit = timm.create_model(start.timm_model, num_classes=0)
        _fill(vit, start.weights)
        model = MatViT.from_timm(vit, image_size=start.image_size)
    model.name = recipe.name
    return model


def load_teacher(recipe: TeacherRecipe) -> Any:
    """The recipe's timm teacher, frozen, in eval mode. Raises RecipeError when it cannot be made."""
    try:
        teacher = timm.create_model(recipe.timm_model, pretrained=recipe.weights is None)
    except Exception as error:  # timm raises RuntimeError for unknown names; the hub client raises its own
        raise RecipeError(
            what=f"timm cannot create it ({str(error).splitlines()[0]})",
            where=f"teacher '{recipe.timm_model}'",
            fix="check the name, and the network if its weights come from the hub",
        ) from error
    if recipe.weights is not None:
        _fill(teacher, recipe.weights)
    return teacher.eval().requires_grad_(False)


def _fill(model: Any, path: Path) -> None:
    try:
        tensors: dict[str, Tensor] = {name: tensor.float() for name, tensor in load_file(path).items()}
        model.load_state_dict(tensors)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise RecipeError(
            what=f"start weights cannot be loaded ({str(error).strip().splitlines()[-1].strip()})",
            where=str(path),
            fix="make them with `python -m matvit_data.start_weights`, or correct the recipe",
        ) from error
