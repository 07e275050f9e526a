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

    Raises RecipeError when it or its weights cannot be had, BackboneError when it cannot be made elastic.
    """
    start = recipe.encoder
    pretrained = start.pretrained and start.weights is None
    vit = _create("encoder", start.timm_model, pretrained=pretrained, sizes=start.model_args | {"num_classes": 0})
    if start.weights is not None:
        _fill(vit, start.weights)
    model = MatViT.from_timm(vit, image_size=start.image_size)
    model.name = recipe.name
    return model


def load_teacher(recipe: TeacherRecipe) -> Any:
    """The recipe's timm teacher, frozen, in eval mode. Raises RecipeError when it cannot be made."""
    teacher = _create("teacher", recipe.timm_model, pretrained=recipe.weights is None, sizes=recipe.model_args)
    if recipe.weights is not None:
        _fill(teacher, recipe.weights)
    return teacher.eval().requires_grad_(False)


def _create(role: str, name: str, *, pretrained: bool, sizes: dict[str, int]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **sizes)
    except Exception as error:  # timm raises RuntimeError for unknown names; the hub client raises its own
        raise RecipeError(
            what=f"timm cannot create it ({(str(error) or type(error).__name__).splitlines()[0]})",
            where=f"{role} '{name}'",
            fix="check the name and model_args, and the network if its weights come from the hub",
        ) from error


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
