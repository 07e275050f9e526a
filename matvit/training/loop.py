"""The only training loop: the stages of a recipe over one MatViT, resumable after a kill at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.scheduler import CosineLRScheduler

from matvit.block import run_block
from matvit.checkpoint import refuse_to_replace
from matvit.datasets import LabelledImages, find_dataset, read_dataset
from matvit.model import MatViT
from matvit.progress import Progress, silent
from matvit.training.batches import TrainingSet
from matvit.training.board import Board, summary_writer
from matvit.training.data import to_device
from matvit.training.heads import Heads
from matvit.training.memory import room_for
from matvit.training.processes import check_equal, ending_together, start_fabric
from matvit.training.recipe import Recipe, Stage
from matvit.training.record import finish, finished_before, provenance, read_validation
from matvit.training.stages import (
    ask_teacher,
    begin_stage,
    check_labels,
    check_specs,
    end_stage,
    make_optimiser,
)
from matvit.training.start import load_teacher, start_encoder, start_hashes
from matvit.training.state import BOARD, ENCODER, Run, only_run, restore, save, tidy
from matvit.training.steps import optimise


def train(
    recipe: Recipe, *, out: Path, resume: bool = True, tensorboard: bool = False, progress: Progress = silent
) -> MatViT:
    """Carry out `recipe`; returns the trained encoder, which is also saved in `out`/encoder.

    Work in progress is kept in `out`/state.pt about once a minute, its log in `out`/log.jsonl; the
    same call continues it, to the same weights; `resume` False starts again. Pictures that cannot be
    read are left out and listed in the checkpoint's training.json. `tensorboard` writes the log's numbers
    to `out`/tensorboard, too.

    With `devices` above 1, Fabric starts this program again for each further device; only the first
    process returns, the others end here.

    Raises RecipeError, DatasetError, SpecError and BackboneError for what cannot be carried out, RecipeError
    and CheckpointError when the disk refuses; what was saved before is then kept. MissingExtraError without TensorBoard
    where it is asked for.
    """
    return carry_out(recipe, out=out, resume=resume, tensorboard=tensorboard, progress=progress).encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What `carry_out` gives."""

    encoder: MatViT
    already_complete: bool  # no step was left to take


def carry_out(
    recipe: Recipe, *, out: Path, resume: bool = True, tensorboard: bool = False, progress: Progress = silent
) -> Trained:
    """As `train`, and tells whether there was anything to train."""
    if tensorboard:
        summary_writer()  # a missing package is told at once
    fabric = start_fabric(recipe)
    if not fabric.is_global_zero:
        progress = silent
    with ending_together(fabric), many_graphs(recipe, fabric), torch.random.fork_rng(devices=[]):
        return _carry_out(recipe, fabric, out, resume=resume, tensorboard=tensorboard, progress=progress)


def many_graphs(recipe: Recipe, fabric: Fabric) -> AbstractContextManager[None]:
    """Within, torch compiles as many graphs of a block as there are.

    What submodels own comes as tensors of fixed sizes, one graph for each and for frozen blocks before it: more than
    the 8 that are allowed.
    """
    if not _compiles(recipe, fabric):
        return nullcontext()
    found: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=32)
    return found


def _compiles(recipe: Recipe, fabric: Fabric) -> bool:
    return recipe.compile and fabric.device.type == "cuda"


def _carry_out(
    recipe: Recipe, fabric: Fabric, out: Path, *, resume: bool, tensorboard: bool, progress: Progress
) -> Trained:
    # Start values of encoder and heads, made on the CPU, for which the caller forks it; every step seeds itself.
    torch.default_generator.manual_seed(recipe.seed)
    labelled = [read_dataset(find_dataset(one.path), classes=one.classes, exclude=one.exclude) for one in recipe.data]
    check_labels(recipe, labelled)
    validation = None if recipe.validation is None else read_validation(recipe.validation)
    refuse_to_replace(out / ENCODER)  # now, not hours later
    with ExitStack() as opened:
        if fabric.is_global_zero:
            opened.enter_context(only_run(out))
        run = prepare(recipe, fabric, labelled, out, progress)
        optimiser_state = restore(run) if resume else None
        left = recipe.stages[run.stage :]
        if left and (made_by := provenance(fabric.device)) not in run.made_by[-1:]:
            run.made_by.append(made_by)
        if recipe.teacher is not None and any(stage.needs_teacher for stage in left):
            run.teacher = load_teacher(recipe.teacher)  # now: weights that do not fit are told before other stages
        if fabric.is_global_zero:
            tidy(out, resume=resume)  # now: an earlier run stays where this one cannot start
            if tensorboard:
                run.board = opened.enter_context(closing(Board(out / BOARD, step=run.steps_done)))
        fabric.barrier()
        while run.stage < len(recipe.stages):
            _run_stage(run, recipe.stages[run.stage], optimiser_state)
            optimiser_state = None
        if not fabric.is_global_zero:
            raise SystemExit(0)
        with room_for(
            f"measuring and saving it does not fit into the memory of {fabric.device}",
            where=str(out / ENCODER),
            fix="free some, and the same command goes on: its training is done",
        ):
            encoder = (None if left else finished_before(run)) or finish(run, validation)
        return Trained(encoder=encoder, already_complete=not left)


def prepare(recipe: Recipe, fabric: Fabric, labelled: Sequence[LabelledImages], out: Path, progress: Progress) -> Run:
    """The run before its first step: encoder, heads, and the pictures of `labelled`, decoded on the device."""
    model = start_encoder(recipe).to(fabric.device)
    start = start_hashes(recipe, model)
    check_specs(model, recipe)
    if _compiles(recipe, fabric):
        model.block_forward = torch.compile(run_block, dynamic=True)  # one graph serves all sizes of slices
    decoded = [
        to_device(
            images,
            resolution=one.resolution,
            device=fabric.device,
            processes=recipe.devices,
            progress=progress,
        )
        for images, one in zip(labelled, recipe.data, strict=True)
    ]
    sets = [
        TrainingSet(images=part[0], batch=one.batch // recipe.devices)
        for part, one in zip(decoded, recipe.data, strict=True)
    ]
    heads = Heads(model.embedding_dim, [one.images.num_classes for one in sets], recipe.teacher)
    mean, std = (
        torch.tensor(value, device=fabric.device).view(3, 1, 1)
        for value in (model.preprocessing.mean, model.preprocessing.std)
    )
    return Run(
        recipe=recipe,
        fabric=fabric,
        model=model,
        heads=heads.to(fabric.device),
        sets=sets,
        labelled=[kept for _, kept, _ in decoded],
        data=[kept.sha256 for _, kept, _ in decoded],  # reads every file again: now, not in mid-training
        skipped=[bad for _, _, bad in decoded],
        folder=out,
        progress=progress,
        start=start,
        mean=mean,
        std=std,
    )


def _run_stage(run: Run, stage: Stage, optimiser_state: dict[str, Any] | None) -> None:
    with room_for(
        f"what it begins with (order, averages, optimiser) does not fit into the memory of {run.fabric.device}",
        where=f"stage '{stage.name}'",
        fix="free some, and the same command goes on, or train a smaller encoder",
    ):
        optimiser, schedule = enter_stage(run, stage)
        if optimiser_state is not None:
            optimiser.load_state_dict(optimiser_state)
    optimise(run, stage, optimiser, schedule)
    end_stage(run, stage)
    check_equal(run.fabric, run.model, run.heads)
    run.stage, run.step = run.stage + 1, 0
    if run.fabric.is_global_zero:
        save(run, None)
    run.fabric.barrier()


def enter_stage(run: Run, stage: Stage) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """All that comes before the stage's first step, or the next one of a resumed stage."""
    if run.step == 0:
        begin_stage(run, stage)
    run.sets = [
        replace(one, batch=batch // run.recipe.devices)
        for one, batch in zip(run.sets, run.recipe.batches_of(stage), strict=True)
    ]
    if stage.needs_teacher and run.sets[0].teacher is None:
        ask_teacher(run)
    return make_optimiser(run, stage)
