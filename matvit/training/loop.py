"""The only training loop: the stages of a recipe over one MatViT, resumable after a kill at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from matvit.block import run_block
from matvit.checkpoint import refuse_to_replace
from matvit.datasets import LabelledImages, find_dataset, read_dataset
from matvit.errors import RecipeError
from matvit.model import MatViT
from matvit.progress import Progress, ProgressEvent, silent
from matvit.spec import SubmodelSpec
from matvit.training.batches import Batch, TrainingSet, draw_batch
from matvit.training.board import Board, summary_writer
from matvit.training.data import to_device
from matvit.training.heads import Heads
from matvit.training.memory import room_for
from matvit.training.objective import objective
from matvit.training.processes import average_gradients, check_equal, ending_together, mean_of, start_fabric
from matvit.training.recipe import Losses, Recipe, Stage
from matvit.training.record import finish, finished_before, provenance, read_validation
from matvit.training.sampling import prefix_of_step, resolution_of_step, specs_of_step
from matvit.training.stages import (
    ask_teacher,
    begin_stage,
    check_labels,
    check_specs,
    end_stage,
    largest_input,
    make_optimiser,
    wants,
)
from matvit.training.start import load_teacher, start_encoder, start_hashes
from matvit.training.state import BOARD, LOG, STATE, Run, only_run, restore, save, tidy, writing
from matvit.training.throughput import Throughput

_SAVE_SECONDS = 60.0  # how much work a kill may cost
_LOG_STEPS = 50


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
    with ending_together(fabric), _many_graphs(recipe, fabric):
        return _carry_out(recipe, fabric, out, resume=resume, tensorboard=tensorboard, progress=progress)


def _many_graphs(recipe: Recipe, fabric: Fabric) -> AbstractContextManager[None]:
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
    torch.manual_seed(recipe.seed)  # start values of the heads; every step seeds itself
    labelled = [read_dataset(find_dataset(one.path), classes=one.classes, exclude=one.exclude) for one in recipe.data]
    check_labels(recipe, labelled)
    validation = None if recipe.validation is None else read_validation(recipe.validation)
    refuse_to_replace(out / "encoder")  # now, not hours later
    with ExitStack() as opened:
        if fabric.is_global_zero:
            opened.enter_context(only_run(out, resume=resume))
        run = _prepare(recipe, fabric, labelled, out, progress)
        optimiser_state = restore(run) if resume else None
        left = recipe.stages[run.stage :]
        if left and (made_by := provenance(fabric.device)) not in run.made_by[-1:]:
            run.made_by.append(made_by)
        if recipe.teacher is not None and any(wants(stage, "need_teacher") for stage in left):
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
            where=str(out / "encoder"),
            fix="free some, and the same command goes on: its training is done",
        ):
            encoder = (None if left else finished_before(run)) or finish(run, validation)
        return Trained(encoder=encoder, already_complete=not left)


def _prepare(recipe: Recipe, fabric: Fabric, labelled: Sequence[LabelledImages], out: Path, progress: Progress) -> Run:
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
        optimiser, schedule = _enter(run, stage)
        if optimiser_state is not None:
            optimiser.load_state_dict(optimiser_state)
    _optimise(run, stage, optimiser, schedule)
    end_stage(run, stage)
    check_equal(run.fabric, run.model)
    run.stage, run.step = run.stage + 1, 0
    if run.fabric.is_global_zero:
        save(run, None)
    run.fabric.barrier()


def _enter(run: Run, stage: Stage) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """All that comes before the stage's first step, or the next one of a resumed stage."""
    if run.step == 0:
        begin_stage(run, stage)
    run.sets = [
        replace(one, batch=batch // run.recipe.devices)
        for one, batch in zip(run.sets, run.recipe.batches_of(stage), strict=True)
    ]
    if wants(stage, "need_teacher") and run.sets[0].teacher is None:
        ask_teacher(run)
    return make_optimiser(run, stage)


def _optimise(run: Run, stage: Stage, optimiser: torch.optim.Optimizer, schedule: CosineLRScheduler) -> None:
    """The stage's steps that are not done yet."""
    saved = began = time.monotonic()
    throughput = Throughput(run.fabric.device, precision=run.recipe.precision)
    unlogged: list[Tensor] = []  # losses
    one_encoder = stage.submodels is None and not wants(stage, "need_anchor")
    largest = largest_input(run.model, stage)
    room_for_batch = partial(
        room_for,
        f"its batch of {sum(run.recipe.batches_of(stage)) // run.recipe.devices} pictures does not fit into the memory "
        f"of {run.fabric.device}",
        where=f"stage '{stage.name}'",
        fix="lower its batches, or data's batch, and start again with --fresh",
    )
    while run.step < stage.steps:
        schedule.step_update(run.step)
        with room_for_batch():
            batch = draw_batch(
                run.sets,
                augmentation=stage.augmentation,
                image_size=_full_resolution(run, stage) if one_encoder else largest,
                with_teacher=wants(stage, "need_teacher"),
                key=(run.recipe.seed, run.stage, run.step, *_own_share(run.fabric)),
            )
            unlogged.append(_step(run, stage, optimiser, batch, throughput))
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.model, step=run.step)
        now = time.monotonic()
        if run.step % _LOG_STEPS == 0 or run.step == stage.steps:
            means = mean_of(run.fabric, torch.stack(unlogged)).tolist()  # so that all processes see a bad one
            unlogged.clear()
            rate = optimiser.param_groups[-2]["lr"]  # the encoder's last layer
            _log(run, stage, losses=means, learning_rate=rate, throughput=throughput)
        if now - saved > _SAVE_SECONDS and run.fabric.is_global_zero:
            _refuse_non_finite(run, stage, optimiser)
            run.seconds += time.monotonic() - began
            save(run, optimiser)
            saved = began = time.monotonic()
    _refuse_non_finite(run, stage, optimiser)
    run.seconds += time.monotonic() - began


def _own_share(fabric: Fabric) -> tuple[int, ...]:
    """What tells the draws of one process from another's; nothing in the first, whatever their number."""
    return () if fabric.is_global_zero else (fabric.global_rank,)


def _full_resolution(run: Run, stage: Stage) -> int:
    native = run.model.config.image_size
    return resolution_of_step(stage.resolutions, native=native, seed=run.recipe.seed, step=run.step)


def _step(run: Run, stage: Stage, optimiser: torch.optim.Optimizer, batch: Batch, throughput: Throughput) -> Tensor:
    """One optimisation step over the full encoder and the step's submodels; the summed loss, detached."""
    shape = run.model.shape
    anchors, anchor = None, run.model if stage.freeze else run.anchor
    if anchor is not None and wants(stage, "need_anchor"):
        with torch.no_grad(), run.fabric.autocast():
            anchors = anchor(run.normalise(batch.at(shape.image_size))).float()
    plan: list[tuple[SubmodelSpec, Losses]] = []
    if stage.full.train_something:
        full = SubmodelSpec.of(shape, shape.ffn_widths, image_size=_full_resolution(run, stage))
        plan.append((full, stage.full))
    if stage.submodels is not None:
        specs = specs_of_step(
            shape,
            fixed=stage.fixed,
            sampled=stage.sampled,
            ladder=stage.ladder,
            seed=run.recipe.seed,
            step=run.step,
        )
        plan += [(spec, stage.submodels) for spec in specs]
    prefix = prefix_of_step(run.model.embedding_dim, seed=run.recipe.seed, step=run.step)
    optimiser.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.fabric.device)
    for spec, weights in plan:  # one backward pass each keeps memory at one submodel's
        with run.fabric.autocast():
            embeddings = run.model(run.normalise(batch.at(spec.image_size)), spec)
        loss = objective(run.heads, weights, embeddings.float(), batch, anchors, prefix=prefix)
        if loss.requires_grad:  # not where all blocks left of a mixed one are XL's, and these frozen
            run.fabric.backward(loss)
        total += loss.detach()
    frozen = 0 if anchors is None else run.model.flops()
    throughput.count(len(batch.images), trained=[run.model.flops(spec) for spec, _ in plan], frozen=frozen)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    average_gradients(run.fabric, parameters)
    nn.utils.clip_grad_norm_(parameters, run.recipe.optimiser.clip_norm)
    optimiser.step()
    return total


def _log(run: Run, stage: Stage, *, losses: list[float], learning_rate: float, throughput: Throughput) -> None:
    """The last of `losses`, those of the steps since the row before."""
    loss = losses[-1]
    for step, one in enumerate(losses, start=run.step - len(losses) + 1):
        if not math.isfinite(one):
            raise _diverged(run, stage, f"the loss is {one}", step=step)
    if not run.fabric.is_global_zero:
        return
    pictures, used = throughput.take()
    pictures *= run.recipe.devices
    row = {
        "stage": stage.name,
        "step": run.step,
        "loss": loss,
        "learning_rate": learning_rate,
        "images_per_second": round(pictures, 1),
        "mfu": used,
        "time": time.time(),
    }
    path = run.folder / LOG
    with writing(path), path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if run.board is not None:
        run.board.write(row, step=run.steps_done)
    note = f"loss {loss:.3f}, {pictures:.0f} pictures/s" + ("" if used is None else f", MFU {used:.0%}")
    run.progress(ProgressEvent(stage=f"train {stage.name}", done=run.step, total=stage.steps, unit="steps", note=note))


def _diverged(run: Run, stage: Stage, what: str, *, step: int) -> RecipeError:
    kept = "nothing was saved before" if run.saved is None else f"{run.folder / STATE} holds {run.saved}"
    return RecipeError(
        what=f"{what} at step {step}",
        where=f"stage '{stage.name}'",
        fix=f"lower its learning_rate and start again with --fresh ({kept})",
    )


def _refuse_non_finite(run: Run, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
    """A loss is looked at now and then, and before its step: the weights may be NaN or infinite all the same."""
    moments = [tensor for state in optimiser.state.values() for tensor in state.values()]
    tensors = [*run.model.state_dict().values(), *run.heads.state_dict().values(), *moments]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise _diverged(run, stage, "its weights or their moments are not finite", step=run.step)
