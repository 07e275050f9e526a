"""The models that a run starts from: the plain encoder and the frozen teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matvit.errors import BackboneError, RecipeError, first_line
from matvit.model import AxesConfig, MatViT
from matvit.regular import check_regular
from matvit.training.recipe import EncoderRecipe, Recipe, TeacherRecipe


def start_encoder(recipe: Recipe) -> MatViT:
    """The recipe's plain encoder as a MatViT, or its checkpoint's, all weights float32 and trainable.

    Raises RecipeError when it or its weights cannot be had, BackboneError when it cannot be made elastic,
    CheckpointError for a checkpoint that cannot be read.
    """
    start = recipe.encoder
    if start.checkpoint is not None:
        model = MatViT.from_pretrained(start.checkpoint)
    else:
        model = _plain_encoder(start)
        open_axes(model, recipe, keep_order=tuple(range(model.shape.num_blocks)))  # until the order is found
    model.name = recipe.name
    return model


def _plain_encoder(start: EncoderRecipe) -> MatViT:
    assert start.timm_model is not None
    pretrained = start.pretrained and start.weights is None
    vit = _create("encoder", start.timm_model, pretrained=pretrained, arguments=start.model_args | {"num_classes": 0})
    try:
        return MatViT.from_timm(vit, weights=start.weights, image_size=start.image_size)
    except BackboneError as error:
        if start.weights is None or error.where != str(start.weights):
            raise
        raise _unfit(error.what, start.weights) from error


def start_hashes(recipe: Recipe, model: MatViT) -> list[str | None]:
    """The sha256 of all weights that the recipe names, for `model` as it was read: a file may be replaced later."""
    hashes = [model.weights_sha256]
    for path in (recipe.encoder.weights, None if recipe.teacher is None else recipe.teacher.weights):
        if path is None:
            hashes.append(None)
            continue
        try:
            check_regular(path)
            with path.open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise _unfit(f"cannot be read: {error.strerror}", path) from error
    return hashes


def open_axes(model: MatViT, recipe: Recipe, *, keep_order: tuple[int, ...]) -> None:
    """From now on the encoder can be cut as the recipe says."""
    start = recipe.encoder
    step = model.config.patch_size if start.resolution_axis else 0
    kept = keep_order if start.depth_axis else ()
    model.open_axes(AxesConfig(heads=start.head_axis, keep_order=kept, image_size_step=step))


def load_teacher(recipe: TeacherRecipe) -> Any:
    """The recipe's timm teacher, frozen, in eval mode. Raises RecipeError when it cannot be made."""
    teacher = plain_teacher(recipe, pretrained=recipe.weights is None)
    if recipe.weights is not None:
        _fill(teacher, recipe.weights)
    return teacher.eval().requires_grad_(False)


def plain_teacher(recipe: TeacherRecipe, *, pretrained: bool = False) -> Any:
    """The recipe's timm teacher with random weights, or timm's own. Raises RecipeError when it cannot be made."""
    return _create("teacher", recipe.timm_model, pretrained=pretrained, arguments=recipe.model_args)


def _create(role: str, name: str, *, pretrained: bool, arguments: Mapping[str, int | float | str]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # timm raises RuntimeError for unknown names; the hub client raises its own
        raise RecipeError(
            what=f"timm cannot create it ({_why(error, arguments)})",
            where=f"{role} '{name}'",
            fix="check the name and model_args, and the network if its weights come from the hub",
        ) from error


def _why(error: Exception, arguments: Mapping[str, int | float | str]) -> str:
    if isinstance(error, AssertionError) and not str(error):
        return f"it refuses one of {', '.join(arguments)}"
    return first_line(error)


def _fill(model: Any, path: Path) -> None:
    try:
        tensors: dict[str, Tensor] = {name: tensor.float() for name, tensor in load_file(path).items()}
        model.load_state_dict(tensors)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise _unfit(str(error).strip().splitlines()[-1].strip(), path) from error


def _unfit(why: str, path: Path) -> RecipeError:
    return RecipeError(
        what=f"start weights cannot be loaded ({why})",
        where=str(path),
        fix="make them with `python -m matvit_data.start_weights`, or correct the recipe",
    )
