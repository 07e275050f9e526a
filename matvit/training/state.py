"""A run under way: what it holds, how it is kept on disk, and how it goes on from there."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning_fabric import Fabric
from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeInt, ValidationError, model_validator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from matvit.datasets import LabelledImages, SkippedPicture
from matvit.durable import remove_unfinished, write_atomic
from matvit.errors import RecipeError
from matvit.locking import HELD, holder_of, is_still, lock, open_lock, sign
from matvit.model import AxesConfig, MatViT
from matvit.private import PrivateConfig
from matvit.progress import Progress
from matvit.regular import check_regular, read_small
from matvit.training.batches import TrainingSet
from matvit.training.board import Board
from matvit.training.heads import Heads
from matvit.training.memory import room_for
from matvit.training.recipe import Recipe, Stage

VERSION = 2  # of what `save` keeps: raised by every change of it; another one's is refused
STATE, LOG, LOCK, BOARD, ENCODER = "state.pt", "log.jsonl", "lock", "tensorboard", "encoder"
_SAID = {"validation", "license", "credits", "notes"}  # of a recipe: no weight depends on these


class _Kept(BaseModel):
    """What `save` writes, as far as torch does not check it itself."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    recipe: Annotated[Any, BeforeValidator(json.loads)]  # pydantic's own JSON refuses texts that are not UTF-8
    start: list[str | None]
    data: Any
    stage: NonNegativeInt
    step: NonNegativeInt
    seconds: float
    made_by: list[dict[str, Any]]
    finished: str | None
    axes: AxesConfig
    model: dict[str, Tensor]
    private: dict[str, Tensor] | None
    private_config: PrivateConfig | None
    ema: dict[str, Tensor] | None
    stage_start: dict[str, Tensor] | None
    heads: dict[str, Tensor]
    anchor: dict[str, Tensor] | None
    optimiser: dict[str, Any] | None

    @model_validator(mode="after")
    def _finite(self) -> _Kept:
        if not all(tensor.isfinite().all() for part in (self.model, self.private or {}) for tensor in part.values()):
            raise ValueError("its weights are not finite")
        return self


@dataclass(kw_only=True)
class Run:
    """Everything that a run holds while it is under way."""

    recipe: Recipe
    fabric: Fabric
    model: MatViT
    heads: Heads
    sets: list[TrainingSet]
    labelled: list[LabelledImages]  # the readable pictures, for the record
    data: list[str]  # the sha256 of each
    skipped: list[list[SkippedPicture]]
    folder: Path
    progress: Progress
    start: list[str | None]  # see `start_hashes`
    mean: Tensor  # (3, 1, 1) on the device, as `std`
    std: Tensor
    teacher: Any = None  # while it has still to be asked
    anchor: MatViT | None = None  # the frozen full encoder of an earlier stage
    ema: ModelEmaV3 | None = None
    stage_start: dict[str, Tensor] | None = None  # the weights, where the stage's result is averaged with them
    stage: int = 0
    step: int = 0
    board: Board | None = None  # TensorBoard's
    saved: str | None = None  # the last save, in words
    seconds: float = 0.0  # spent in optimisation, over all starts
    made_by: list[dict[str, Any]] = field(default_factory=list)  # device, versions and commit of those that took steps
    finished: str | None = None  # when it was last saved

    @property
    def steps_done(self) -> int:
        """Over all stages."""
        return sum(stage.steps for stage in self.recipe.stages[: self.stage]) + self.step

    def normalise(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the encoder takes them."""
        return (images - self.mean) / self.std


def follow(model: MatViT, stage: Stage) -> ModelEmaV3:
    """The moving average of all weights from here on, quick at first (timm's warm-up)."""
    return ModelEmaV3(model, decay=stage.ema, use_warmup=True)


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Make the run's folder, and keep other processes from training in it.

    Raises RecipeError where one does, and where files of the user's own would be overwritten or mixed with its.
    """
    path = out / LOCK
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(out)
        is_new = not path.exists()
        descriptor = open_lock(path)
    try:
        try:
            lock(descriptor)
            if not is_still(path, descriptor):
                raise OSError(errno.EWOULDBLOCK, "replaced by another process")
        except OSError as error:  # some network disks have no locks
            if error.errno in HELD:
                raise RecipeError(
                    what=f"process {holder_of(path)} is training in this folder",
                    where=str(out),
                    fix="wait until it is done, stop it, or choose another --out",
                ) from error
        with writing(path):
            sign(path, descriptor)
        try:
            yield
        finally:
            if is_new and not any((out / name).exists() for name in (STATE, LOG, BOARD)):  # the run did not start
                with suppress(OSError):
                    path.unlink()
    finally:
        os.close(descriptor)


def _refuse_foreign(out: Path) -> None:
    foreign = _foreign(out)
    if foreign is not None:
        raise RecipeError(
            what=f"holds '{foreign}', which is no part of a run",
            where=str(out),
            fix="choose a new or empty --out, or move it away",
        )


def _foreign(out: Path) -> str | None:
    """The name of what no run wrote, unless the folder is a run's: by the process id in its lock, or by its state.

    A lock is empty, or zeros, after a power failure: then it tells nothing.
    """
    for name in (STATE, LOG):
        if (out / name).exists() and not (out / name).is_file():
            return name
    is_state = _is_state(out / STATE)
    if is_state is False:
        return STATE
    content = read_small(out / LOCK) if (out / LOCK).is_file() else b""
    if not re.fullmatch(rb"\d*\s*|\0+", content):
        return LOCK
    if is_state or content.strip(b"\0").strip():
        return None
    there = (entry.name for entry in out.iterdir())
    return min((name for name in there if name not in (ENCODER, LOCK) and not name.startswith(".")), default=None)


def _is_state(path: Path) -> bool | None:
    """Whether a run of any version saved it, of which no tensor is read; None: missing or damaged."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds for a damaged file
        return None
    return isinstance(found, dict) and {"version", "recipe"} <= found.keys()


def tidy(out: Path, *, resume: bool) -> None:
    """Remove what a killed run left half written; without `resume`, its state and log, too.

    An encoder stays until the new one takes its place.
    """
    for name in (STATE, LOG):
        with writing(out / name):
            remove_unfinished(out / name)
            if not resume or not (out / STATE).exists():  # the log of a run that was killed before its first save
                (out / name).unlink(missing_ok=True)


def save(run: Run, optimiser: torch.optim.Optimizer | None) -> None:
    """Keep the run, atomically. `optimiser` None: between stages."""
    run.finished = datetime.now(UTC).isoformat(timespec="seconds")
    state = {
        "version": VERSION,
        "recipe": json.dumps(run.recipe.model_dump(mode="json")),
        "start": run.start,
        "data": run.data,
        "stage": run.stage,
        "step": run.step,
        "seconds": run.seconds,
        "made_by": run.made_by,
        "finished": run.finished,
        "axes": run.model.axes.model_dump(),
        "model": run.model.vit.state_dict(),
        "private": None if run.model.private is None else run.model.private.state_dict(),
        "private_config": None if run.model.private is None else run.model.private.config.model_dump(),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "stage_start": run.stage_start,
        "heads": run.heads.state_dict(),
        "anchor": None if run.anchor is None else run.anchor.vit.state_dict(),
        "optimiser": None if optimiser is None else optimiser.state_dict(),
    }
    path = run.folder / STATE
    content = io.BytesIO()  # torch.save hides the errors of a file
    what, fix = "the host's memory has no room to make it", "free some, and the same command goes on from the last save"
    with room_for(what, where=str(path), fix=fix):
        torch.save(state, content)
        with writing(path):
            write_atomic(path, content.getvalue())
    run.saved = _in_words(run)


def _in_words(run: Run) -> str:
    if run.step:
        return f"stage '{run.recipe.stages[run.stage].name}' up to step {run.step}"
    return f"all of stage '{run.recipe.stages[run.stage - 1].name}'"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that refuses to write `path` is told as RecipeError."""
    try:
        yield
    except OSError as error:
        raise RecipeError(
            what=f"cannot be written ({error.strerror})",
            where=str(path),
            fix="mend that, and the same command goes on from the last save",
        ) from error


def restore(run: Run) -> dict[str, Any] | None:
    """Continue from the folder's state, if there is one; returns the optimiser's part.

    Raises RecipeError for a state that is damaged, of another run, or too large for the memory.
    """
    path = run.folder / STATE
    if not path.exists():
        return None
    what, fix = f"does not fit into the memory of {run.fabric.device}", "free some, and the same command goes on"
    with room_for(what, where=str(path), fix=fix):
        state = _read(path, run.fabric.device)
        if other := _other(run, state):
            raise RecipeError(what=other, where=str(path), fix="choose another --out, or start again with --fresh")
        stages = run.recipe.stages
        if (state["stage"], state["step"]) > (len(stages), 0) or (state["optimiser"] is None) != (state["step"] == 0):
            raise _damaged(path)
        optimiser_state = _take(run, state)
    run.saved = _in_words(run)
    if run.fabric.is_global_zero:
        _forget_later_rows(run)
    return optimiser_state


def _read(path: Path, device: torch.device) -> Any:
    try:
        check_regular(path)  # a pipe would be waited for
        _check_sums(path)
        state = torch.load(path, map_location=device, weights_only=True)
        if isinstance(state, dict) and state.get("version") == VERSION:
            _Kept.model_validate(state)
        return state
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise RecipeError(what=what, where=str(path), fix="mend that, or start again with --fresh") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _damaged(path) from error


def _damaged(path: Path) -> RecipeError:
    return RecipeError(what="is damaged", where=str(path), fix="start again with --fresh")


def _other(run: Run, state: Any) -> str | None:
    """What keeps `run` from going on from the state, if anything does."""
    if not isinstance(state, dict) or state.get("version") != VERSION:
        return "was written by another version"
    try:
        recipe = Recipe.model_validate(json.loads(state["recipe"]))
    except ValidationError:  # what a recipe may say was narrowed
        return "was written by another version"
    if not _same_weights(recipe, run.recipe):
        return "belongs to another recipe"
    if state["data"] != run.data:
        return "belongs to other pictures"
    if state["start"] != run.start:
        return "belongs to other start weights or another teacher at the same place"
    return None


def _same_weights(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same: what is said and measured of the result may be corrected."""
    return one.model_dump(exclude=_SAID) == other.model_dump(exclude=_SAID)


def _check_sums(path: Path) -> None:
    """torch.load ignores the check sums that torch.save writes, and leaves unread what is marked as a folder."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile


def _take(run: Run, state: dict[str, Any]) -> dict[str, Any] | None:
    def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        found, expected = ({name: one.shape for name, one in of.items()} for of in (tensors, module.state_dict()))
        if found != expected:
            raise _damaged(run.folder / STATE)
        module.load_state_dict(tensors)

    run.stage, run.step, run.seconds = state["stage"], state["step"], state["seconds"]
    run.made_by, run.finished = state["made_by"], state["finished"]
    run.model.open_axes(AxesConfig.model_validate(state["axes"]))
    if state["anchor"] is not None:
        run.anchor = copy.deepcopy(run.model).requires_grad_(False)
        fill(run.anchor.vit, state["anchor"])
    fill(run.model.vit, state["model"])
    if state["private"] is not None:
        private = run.model.add_private(PrivateConfig.model_validate(state["private_config"]))
        fill(private, state["private"])
    if state["ema"] is not None:
        run.ema = follow(run.model, run.recipe.stages[run.stage])
        fill(run.ema.module, state["ema"])
    run.stage_start = state["stage_start"]
    fill(run.heads, state["heads"])
    optimiser: dict[str, Any] | None = state["optimiser"]
    return optimiser


def _forget_later_rows(run: Run) -> None:
    """Leave out of the log what was done after the last save, for it will be done again, and what is no row."""
    path = run.folder / LOG
    if not path.exists():
        return
    with writing(path):
        check_regular(path)
        kept = [line + b"\n" for line in path.read_bytes().splitlines() if _is_kept(line, run)]
        write_atomic(path, b"".join(kept))


def _is_kept(line: bytes, run: Run) -> bool:
    names = [stage.name for stage in run.recipe.stages]
    try:
        row = json.loads(line)
        return (names.index(row["stage"]), row["step"]) <= (run.stage, run.step)
    except (ValueError, TypeError, KeyError, RecursionError):  # a kill may cut a line short
        return False
