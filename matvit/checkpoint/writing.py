"""From the elastic encoder to a checkpoint's files."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from safetensors.numpy import save as save_safetensors

from matvit import quantization
from matvit.checkpoint.forms import (
    CARD,
    CONFIG,
    NAME,
    PARETO,
    PRIVATE,
    TRAINING,
    WEIGHTS,
    CheckpointConfig,
    PreprocessingConfig,
    Storage,
    WeightsConfig,
    not_finite,
    read_config,
    rows_to_json,
    to_json,
)
from matvit.checkpoint.places import refuse_to_replace
from matvit.checkpoint.swap import remove_leftovers, replace_folder
from matvit.durable import remove_unfinished, write_together
from matvit.errors import CheckpointError
from matvit.identity import space_id
from matvit.model import MatViT
from matvit.model_card import model_card, with_table
from matvit.preprocess import FloatArray
from matvit.regular import read_small


def save(model: MatViT, folder: str | Path, *, storage: Storage = "float32") -> None:
    """Write `model` as a checkpoint folder, replacing an earlier checkpoint there.

    That is one step on Linux. Elsewhere it is two renames: a kill exactly between them leaves the earlier
    checkpoint whole under a dotted name beside the folder, until the next save.
    With storage "int8" the weights are rounded in the file only: load it to get what it computes.
    Raises CheckpointError when `folder` exists and holds anything but a checkpoint, when a weight is
    NaN or infinite, or when the files cannot be written; an earlier checkpoint is then left as it was.
    """
    if storage not in get_args(Storage):
        raise CheckpointError(
            what=f"{storage!r} is unknown", where="storage", fix=f"give {' or '.join(get_args(Storage))}"
        )
    target = refuse_to_replace(folder)
    files = _files(model, storage)
    try:
        try:
            replace_folder(target, files)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            refuse_to_replace(folder)  # another process's first save was faster
            replace_folder(target, files)
    except OSError as error:
        raise _unwritable(target, error) from error
    remove_leftovers(target)


def save_table(model: MatViT, folder: Path) -> None:
    """Write `model.pareto` into the checkpoint that `model` came from: pareto.json, and its part of the model card.

    All else in the folder stays, what is no part of a checkpoint too. Raises CheckpointError when the folder cannot be
    written, or holds another encoder by now.
    """
    if read_config(folder).weights.sha256 != model.weights_sha256:
        raise CheckpointError(
            what="holds another encoder than the one that was measured",
            where=str(folder),
            fix="measure that one, or put the other one back",
        )
    files = {folder / PARETO: rows_to_json(model.pareto)}
    try:
        if (card := folder / CARD).exists():
            files[card] = with_table(read_small(card), model)
        for path in files:
            remove_unfinished(path)
        write_together(files)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        what=f"cannot be written ({error.strerror})",
        where=str(folder),
        fix="free some space or choose a new folder",
    )


def _files(model: MatViT, storage: Storage) -> dict[str, bytes]:
    _check_name(model.name)
    stored, computed = _tensors(model, storage)
    weights = save_safetensors({name: stored[name] for name in sorted(stored)})
    config = CheckpointConfig(
        format_version=1 if model.private is None else 2,
        name=model.name,
        encoder=model.config,
        axes=model.axes,
        private=None if model.private is None else model.private.config,
        preprocessing=PreprocessingConfig(**model.preprocessing.to_json()),
        weights=WeightsConfig(
            file="model.safetensors", bytes=len(weights), sha256=hashlib.sha256(weights).hexdigest(), storage=storage
        ),
        space_id=space_id(
            {name: tensor for name, tensor in computed.items() if not name.startswith(PRIVATE)},
            model.config,
            model.preprocessing,
        ),
    )
    absent = {"private"} if config.private is None else set()  # older programs refuse fields that they do not know
    return {
        CONFIG: to_json(config.model_dump(mode="json", exclude=absent)),
        WEIGHTS: weights,
        PARETO: rows_to_json(model.pareto),
        TRAINING: to_json(model.record),
        CARD: model_card(model).encode(errors="backslashreplace"),
    }


def _tensors(model: MatViT, storage: Storage) -> tuple[quantization.Tensors, dict[str, FloatArray]]:
    """By name, as they are stored, and as they are computed with after loading: one and the same without rounding."""
    named = model.vit.state_dict()
    if model.private is not None:
        named |= model.private.state_dict(prefix=PRIVATE)
    tensors = {name: tensor.detach().float().cpu().numpy() for name, tensor in named.items()}
    _refuse_non_finite(tensors)
    if storage == "float32":
        return tensors, tensors
    stored = quantization.quantize(tensors)
    computed = quantization.dequantize(stored)
    _refuse_non_finite(computed)  # rounding to int8 can push the largest float32 over the edge
    return stored, computed


def _check_name(name: str) -> None:
    try:
        NAME.validate_python(name)
    except ValidationError as error:
        raise CheckpointError(
            what="is not a text of at most 200 characters without control characters",
            where="the encoder's name",
            fix="give it another name",
        ) from error


def _refuse_non_finite(tensors: dict[str, FloatArray]) -> None:
    if (name := not_finite(tensors)) is not None:
        raise CheckpointError(
            what="has NaN or infinite values",
            where=f"tensor '{name}'",
            fix="save an encoder whose training converged",
        )
