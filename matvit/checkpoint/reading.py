"""From a checkpoint's files to the elastic encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from matvit import backbone, quantization
from matvit.checkpoint.forms import (
    CONFIG,
    PARETO,
    PRIVATE,
    RECORD,
    ROWS,
    TRAINING,
    WEIGHTS,
    CheckpointConfig,
    damaged,
    not_finite,
    read_checked,
    read_config,
)
from matvit.checkpoint.places import locate, provenance
from matvit.errors import BackboneError, SpecError
from matvit.model import MatViT
from matvit.preprocess import FloatArray, Preprocessing
from matvit.private import PrivateConfig
from matvit.regular import check_regular


def load(source: str | Path, *, revision: str | None = None) -> MatViT:
    """The elastic encoder of a checkpoint, on the CPU, in eval mode.

    Raises CheckpointError when the checkpoint is missing, damaged, or of a newer format.
    """
    folder = locate(source, revision=revision)
    config = read_config(folder)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in read_tensors(folder, config).items()}
    own = {name.removeprefix(PRIVATE): tensors.pop(name) for name in list(tensors) if name.startswith(PRIVATE)}
    try:
        model = MatViT(
            backbone.build(config.encoder, tensors),
            preprocessing=Preprocessing(**config.preprocessing.model_dump()),
            axes=config.axes,
            name=config.name,
        )
    except (BackboneError, SpecError) as error:
        raise damaged(folder / CONFIG, error.what) from error
    _fill_private(model, config.private, own, folder / WEIGHTS)
    model.source, model.revision = provenance(source, folder)
    model.weights_sha256 = config.weights.sha256
    model.pareto = tuple(read_checked(folder / PARETO, ROWS, missing=[]))
    _check_specs(model, folder / PARETO)
    model.record = read_checked(folder / TRAINING, RECORD, missing={})
    found = model.space_id
    if found != config.space_id:
        raise damaged(folder / CONFIG, f"its space_id {config.space_id:.8} is not the weights' {found:.8}")
    return model


def _fill_private(model: MatViT, config: PrivateConfig | None, own: dict[str, torch.Tensor], path: Path) -> None:
    if config is not None:
        model.add_private(config)
    expected = {} if model.private is None else model.private.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: one.shape for name, one in expected.items()}:
        raise damaged(path, "its private parameters are not those that config.json says")
    if model.private is not None:
        model.private.load_state_dict(own)


def _check_specs(model: MatViT, path: Path) -> None:
    for row in model.pareto:
        try:
            model.shape.spec(row["spec"])
        except SpecError as error:
            raise damaged(path, f"row '{row['name']}': {error.what}") from error


def read_tensors(folder: Path, config: CheckpointConfig) -> dict[str, FloatArray]:
    """The tensors, de-quantised to float32, after checking the file's hash.

    Raises CheckpointError when the file is missing, not the one that the config names, or not stored as it says.
    """
    path = folder / config.weights.file
    try:
        size = check_regular(path).st_size
        content = path.read_bytes() if size == config.weights.bytes else b""
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error
    if size != config.weights.bytes:
        raise damaged(path, f"has {size} bytes, not the {config.weights.bytes} that config.json says")
    if hashlib.sha256(content).hexdigest() != config.weights.sha256:
        raise damaged(path, "its sha256 is not the one in config.json")
    try:
        stored = load_safetensors(content)
        int8 = config.weights.storage == "int8"
        tensors = quantization.dequantize(stored) if int8 else quantization.only_float32(stored)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # another writer's dtypes and shapes
        raise damaged(path, f"not a readable file of {config.weights.storage} safetensors ({error})") from error
    if (name := not_finite(tensors)) is not None:
        raise damaged(path, f"tensor '{name}' has NaN or infinite values")
    return tensors
