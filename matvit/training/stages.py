"""How a stage begins and ends: what is ordered, frozen, owned, asked of the teacher, and averaged."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from matvit.datasets import LabelledImages
from matvit.errors import DatasetError, RecipeError, SpecError
from matvit.fitting import fit_private
from matvit.importance import find_keep_order, order_by_importance
from matvit.model import MatViT
from matvit.private import PrivateConfig, owns_something
from matvit.spec import SubmodelSpec
from matvit.training.batches import draw_batch
from matvit.training.memory import room_for
from matvit.training.processes import send_to_all
from matvit.training.recipe import Recipe, Stage
from matvit.training.sampling import ladder_spec
from matvit.training.start import open_axes
from matvit.training.state import Run, follow
from matvit.training.teacher import teach

_FIRST_PICTURES = 512  # that the importance of hidden units is measured on, and what they give is fitted to


def check_specs(model: MatViT, recipe: Recipe) -> None:
    """What a stage asks for and this encoder has not is told now, not after other stages. Raises RecipeError."""
    for stage in recipe.stages:
        if model.private is not None:
            _check_owned(model.private.config, stage)
        for pixels in stage.resolutions:
            _spec(model, stage, f"XL-r{pixels}")
        for text in (*stage.fixed, *stage.ladder):
            spec = _spec(model, stage, text)
            if stage.freeze and not owns_something(model.shape, spec):
                raise RecipeError(
                    what=f"'{text}' owns nothing that stage '{stage.name}' trains",
                    where="recipe",
                    fix="leave it out there: only blocks of S, M and L have private parameters",
                )


def _check_owned(owned: PrivateConfig, stage: Stage) -> None:
    """What the checkpoint's submodels own already is trained further, as it is."""
    if owned.rank is None:
        what, fix = "what the checkpoint's submodels own is their last block's alone", "go on from what was adapted"
    elif stage.private != owned.rank:
        what = f"stage '{stage.name}' does not train what the checkpoint's submodels own"
        fix = f"give it private: {owned.rank}"
    elif stage.fit:
        what, fix = f"stage '{stage.name}' fits what the checkpoint's submodels own already", "leave fit out"
    else:
        return
    raise RecipeError(what=what, where="recipe", fix=fix)


def _spec(model: MatViT, stage: Stage, text: str) -> SubmodelSpec:
    try:
        return ladder_spec(model.shape, text, random.Random(0))  # noqa: S311  # a seed, not a secret
    except SpecError as error:
        what = f"stage '{stage.name}' asks for '{text}': {error.what}"
        raise RecipeError(what=what, where="recipe", fix=error.fix) from error


def check_labels(recipe: Recipe, labelled: Sequence[LabelledImages]) -> None:
    """Raises DatasetError where classes are to be told apart and a data set has only one."""
    wanted = any(losses.classification for stage in recipe.stages for losses in stage.losses)
    for images in labelled:
        if wanted and len(images.class_names) < 2:
            raise DatasetError(
                what=f"has one class, '{images.class_names[0]}', and classification needs two",
                where=images.name,
                fix="give class folders, or classification: 0 in every stage and a teacher",
            )


def begin_stage(run: Run, stage: Stage) -> None:
    """Nesting begins, private parameters are added, the weights kept that the result is averaged with."""
    if not any(one.submodels for one in run.recipe.stages[: run.stage]):
        _begin_nesting(run, stage)
    if stage.private is not None and run.model.private is None:
        run.model.add_private(PrivateConfig(rank=stage.private))
        if stage.fit:
            fit_private(run.model, _pictures(run, stage))
            send_to_all(run.fabric, run.model)  # as after ordering
    if stage.ema is not None:
        run.ema = follow(run.model, stage)
    if stage.average < 1:
        run.stage_start = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def _begin_nesting(run: Run, stage: Stage) -> None:
    """Freeze what is aligned to, and order hidden units and blocks, before submodels are first trained."""
    later = run.recipe.stages[run.stage :] if stage.submodels else (stage,)
    if any(one.needs_anchor and not one.freeze for one in later):
        run.anchor = copy.deepcopy(run.model).requires_grad_(False)
    if stage.submodels is not None and run.recipe.encoder.checkpoint is None:  # whose units and blocks are in order
        images = _pictures(run, stage)
        order_by_importance(run.model, images)
        if run.recipe.encoder.depth_axis:
            keep_order = run.fabric.broadcast(find_keep_order(run.model, images))
            open_axes(run.model, run.recipe, keep_order=keep_order)
        send_to_all(run.fabric, run.model.vit)  # near ties may have been ordered otherwise on another device


def _pictures(run: Run, stage: Stage) -> Tensor:
    """What a stage is prepared with, (B, 3, R, R): the same in all processes."""
    batch = draw_batch(
        [replace(one, batch=_FIRST_PICTURES // len(run.sets)) for one in run.sets],
        augmentation=stage.augmentation,
        image_size=run.model.config.image_size,
        with_teacher=False,
        key=(run.recipe.seed, run.stage, -1),
    )
    return run.normalise(batch.images)


@torch.no_grad()
def end_stage(run: Run, stage: Stage) -> None:
    """Take the moving average as the result, then average that with the stage's first weights, if it says so."""
    if run.ema is not None:
        run.model.load_state_dict(run.ema.module.state_dict())
    if run.stage_start is not None:
        for name, tensor in run.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(run.stage_start[name], 1 - stage.average)
    run.ema = run.stage_start = None


def ask_teacher(run: Run) -> None:
    """Crops are drawn as the first stage that asks says: a resumed later stage sees the same ones."""
    with room_for(
        f"what it says of all pictures does not fit into the memory of {run.fabric.device} beside them",
        where="teacher",
        fix="free some, and the same command goes on, or lower views and start again with --fresh",
    ):
        _ask_teacher(run)


def _ask_teacher(run: Run) -> None:
    recipe = run.recipe.teacher
    augmentation = next(one.augmentation for one in run.recipe.stages if one.needs_teacher)
    assert recipe is not None
    assert run.teacher is not None
    teacher, run.teacher = run.teacher.to(run.fabric.device), None
    run.sets = [
        replace(
            one,
            teacher=teach(
                teacher,
                one.images,
                recipe,
                augmentation=augmentation,
                fabric=run.fabric,
                seed=run.recipe.seed + index,
                progress=run.progress,
            ),
        )
        for index, one in enumerate(run.sets)
    ]
    batches = [one.batch for one in run.recipe.data]
    features = [one.teacher.features.float().mean(dim=(0, 1)) for one in run.sets if one.teacher]
    weighted = [mean * batch for mean, batch in zip(features, batches, strict=True)]
    run.heads.feature_mean.copy_(torch.stack(weighted).sum(dim=0) / sum(batches))
    send_to_all(run.fabric, run.heads)  # another device may have rounded otherwise


def make_optimiser(run: Run, stage: Stage) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """AdamW over what the stage trains, its last group but one the encoder's last layer, and the rates' course."""
    recipe = run.recipe.optimiser
    run.model.vit.requires_grad_(not stage.freeze)
    groups: list[dict[str, Any]] = []
    if run.model.private is not None:
        groups.append({"params": list(run.model.private.parameters()), "weight_decay": 0.0})
    if not stage.freeze:
        groups += param_groups_layer_decay(
            run.model.vit,
            weight_decay=recipe.weight_decay,
            no_weight_decay_list=run.model.vit.no_weight_decay(),
            layer_decay=recipe.layer_decay,
        )
    groups.append({"params": list(run.heads.parameters()), "weight_decay": 0.0, "lr_scale": recipe.head_rate})
    fused = run.fabric.device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=recipe.betas, fused=fused)
    schedule = CosineLRScheduler(
        optimiser,
        t_initial=stage.steps,
        warmup_t=round(recipe.warmup * stage.steps),
        warmup_lr_init=0.0,
        t_in_epochs=False,
    )
    return optimiser, schedule
