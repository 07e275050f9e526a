"""The steps of one stage: batch, losses of the full encoder and submodels, optimiser; log and saves in between."""

from __future__ import annotations

import json
import math
import random
import time
from functools import partial

import torch
from lightning_fabric import Fabric
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from matvit.errors import RecipeError
from matvit.progress import ProgressEvent
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.training.batches import Batch, draw_batch
from matvit.training.memory import room_for
from matvit.training.objective import objective
from matvit.training.processes import average_gradients, mean_of
from matvit.training.recipe import Losses, Stage
from matvit.training.sampling import ladder_spec, prefix_of_step, resolution_of_step, specs_of_step
from matvit.training.state import LOG, STATE, Run, save, writing
from matvit.training.throughput import Throughput

_SAVE_SECONDS = 60.0  # how much work a kill may cost
_LOG_STEPS = 50


def optimise(run: Run, stage: Stage, optimiser: torch.optim.Optimizer, schedule: CosineLRScheduler) -> None:
    """Take the stage's steps that are not done yet; the run is saved about once a minute.

    Raises RecipeError where a batch does not fit into memory, the losses or weights are no longer finite, or the disk
    refuses.
    """
    saved = began = time.monotonic()
    throughput = Throughput(run.fabric.device, precision=run.recipe.precision)
    unlogged: list[Tensor] = []  # losses
    one_encoder = stage.submodels is None and not stage.needs_anchor
    largest = _largest_input(run.model.shape, stage)
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
                with_teacher=stage.needs_teacher,
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


def _largest_input(shape: EncoderShape, stage: Stage) -> int:
    """The resolution, pixels, that holds all that the stage's encoders are given; it depends on no draw."""
    specs = [ladder_spec(shape, text, random.Random(0)) for text in (*stage.fixed, *stage.ladder)]  # noqa: S311
    return max(shape.image_size, *stage.resolutions, *(spec.image_size for spec in specs))


def _full_resolution(run: Run, stage: Stage) -> int:
    native = run.model.config.image_size
    return resolution_of_step(stage.resolutions, native=native, seed=run.recipe.seed, step=run.step)


def _step(run: Run, stage: Stage, optimiser: torch.optim.Optimizer, batch: Batch, throughput: Throughput) -> Tensor:
    """One optimisation step over the full encoder and the step's submodels; the summed loss, detached."""
    shape = run.model.shape
    anchors, anchor = None, run.model if stage.freeze else run.anchor
    if anchor is not None and stage.needs_anchor:
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
