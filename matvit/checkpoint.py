"""Checkpoints: a folder (or hub repository) that holds one trained elastic encoder.

config.json          format version, name, architecture, axes, preprocessing, weight file, space_id
model.safetensors    the full encoder's tensors, of which submodels are slices, and what these own besides
pareto.json          per submodel: FLOPs, parameters, measured quality and latency
training.json        recipe, data, seed, code version and metrics of the run that made it
README.md            model card
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from matvit import backbone, quantization
from matvit.bundled import bundled_folders
from matvit.durable import sync_folder, write_synced
from matvit.errors import BackboneError, CheckpointError, SpecError
from matvit.identity import space_id
from matvit.model import AxesConfig, MatViT
from matvit.model_card import model_card
from matvit.preprocess import Preprocessing
from matvit.private import PrivateConfig
from matvit.regular import check_regular, read_small

FORMAT_VERSION = 2  # written only where version 1 has no place for what is to be kept
CONFIG, WEIGHTS, PARETO, TRAINING, CARD = (
    "config.json",
    "model.safetensors",
    "pareto.json",
    "training.json",
    "README.md",
)
Storage = Literal["float32", "int8"]
_Kind = Literal["new", "old"]
_ABANDONED_SECONDS = 3600.0  # no save writes a file for longer
_PRIVATE = "private."  # begins the names of the tensors that submodels own


class PreprocessingConfig(BaseModel):
    """JSON form of `Preprocessing`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    crop: Literal["centre-square"]
    resize: Literal["bilinear-antialiased"]
    jpeg_scale: NonNegativeInt


class WeightsConfig(BaseModel):
    """The weight file, its hash, and how its matrices are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Literal["model.safetensors"]
    bytes: int
    sha256: str
    storage: Storage


_Name = Annotated[str, Field(max_length=200, pattern=r"^\P{Cc}*$")]  # it is shown: no control characters
_NAME: TypeAdapter[str] = TypeAdapter(_Name)


class CheckpointConfig(BaseModel):
    """config.json, field by field: see docs/formats/checkpoint.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2]
    name: _Name
    encoder: backbone.ViTConfig
    axes: AxesConfig
    private: PrivateConfig | None = None  # with version 2 alone
    preprocessing: PreprocessingConfig
    weights: WeightsConfig
    space_id: str

    @model_validator(mode="after")
    def _version(self) -> CheckpointConfig:
        if (self.format_version == 2) != (self.private is not None):
            raise ValueError("private parameters make a checkpoint version 2, and nothing else does")
        return self


class ParetoRow(BaseModel):
    """One row of pareto.json: a submodel, its cost, and what was measured of it; more may be said."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)  # it is used as it stands in the file

    name: str
    spec: str
    flops: int = Field(ge=0, lt=2**63)
    params: int = Field(ge=0, lt=2**63)
    relative_flops: FiniteFloat
    quality: dict[str, FiniteFloat] = {}


class _Record(BaseModel):
    """What is used of training.json; more may be said."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    license: str | None = None
    credits: list[str] = []
    notes: list[str] = []
    data: list[dict[str, Any]] = []


def pareto_row(model: MatViT, spec: str, quality: dict[str, float]) -> dict[str, Any]:
    """A `ParetoRow` of pareto.json: what the submodel costs, and the quality that was measured."""
    flops = model.flops(spec)
    return {
        "name": spec,
        "spec": spec,
        "flops": flops,
        "params": model.num_params(spec),
        "relative_flops": flops / model.flops(),
        "quality": quality,
    }


_PARETO: TypeAdapter[list[ParetoRow]] = TypeAdapter(list[ParetoRow])
_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)
NO_SUCH = "no such checkpoint"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # not ../folder


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a bundled name, a checkpoint folder or a hub repository id (downloaded if new).

    Raises CheckpointError when there is none.
    """
    text = _text(source)
    if _is_bundled(source):
        return bundled_folders()[text]
    try:
        exists, is_folder = Path(text).exists(), Path(text).is_dir()
    except (OSError, ValueError) as error:  # no file name at all, or in a folder that may not be read
        raise CheckpointError(what=f"cannot be looked up ({error})", where=text[:200], fix="check the path") from error
    if is_folder:
        return Path(text)
    if not exists:
        _refuse_half_swapped(Path(text))
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not exists:
        return _download(text, revision)
    raise CheckpointError(
        what="is a file, not a checkpoint folder" if exists else NO_SUCH,
        where=text,
        fix=f"give a bundled name ({', '.join(bundled_folders())}), a checkpoint folder, or a hub id (owner/name)",
    )


def _text(source: object) -> str:
    if isinstance(source, str | os.PathLike) and isinstance(text := os.fspath(source), str):
        return text
    raise CheckpointError(
        what=f"a {type(source).__name__} names no checkpoint",
        where="checkpoint",
        fix="give a bundled name, a folder or a hub id as text",
    )


def load(source: str | Path, *, revision: str | None = None) -> MatViT:
    """The elastic encoder of a checkpoint, on the CPU, in eval mode.

    Raises CheckpointError when the checkpoint is missing, damaged, or of a newer format.
    """
    folder = locate(source, revision=revision)
    config = read_config(folder)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in read_tensors(folder, config).items()}
    own = {name.removeprefix(_PRIVATE): tensors.pop(name) for name in list(tensors) if name.startswith(_PRIVATE)}
    try:
        model = MatViT(
            backbone.build(config.encoder, tensors),
            preprocessing=Preprocessing(**config.preprocessing.model_dump()),
            axes=config.axes,
            name=config.name,
        )
    except (BackboneError, SpecError) as error:
        raise _damaged(folder / CONFIG, error.what) from error
    _fill_private(model, config.private, own, folder / WEIGHTS)
    model.source, model.revision = _provenance(source, folder)
    model.weights_sha256 = config.weights.sha256
    model.pareto = tuple(_read_checked(folder / PARETO, _PARETO, missing=[]))
    _check_specs(model, folder / PARETO)
    model.record = _read_checked(folder / TRAINING, _RECORD, missing={})
    found = model.space_id
    if found != config.space_id:
        raise _damaged(folder / CONFIG, f"its space_id {config.space_id:.8} is not the weights' {found:.8}")
    return model


def _fill_private(model: MatViT, config: PrivateConfig | None, own: dict[str, torch.Tensor], path: Path) -> None:
    if config is not None:
        model.add_private(config)
    expected = {} if model.private is None else model.private.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: one.shape for name, one in expected.items()}:
        raise _damaged(path, "its private parameters are not those that config.json says")
    if model.private is not None:
        model.private.load_state_dict(own)


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
    unfinished = _beside(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        for name, content in files.items():
            write_synced(unfinished / name, content)
        sync_folder(unfinished)
        _swap(unfinished, target)
    except OSError as error:
        raise CheckpointError(
            what=f"cannot be written ({error.strerror})",
            where=str(target),
            fix="free some space or choose a new folder",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _remove_leftovers(target)


def read_config(folder: Path) -> CheckpointConfig:
    """config.json, checked. Raises CheckpointError when it is missing, malformed, or of a newer format."""
    path = folder / CONFIG
    raw = _read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            what=f"checkpoint format {version} is newer than this program's {FORMAT_VERSION}",
            where=str(path),
            fix="upgrade matvit-retrieval",
        )
    try:
        return CheckpointConfig.model_validate(raw)
    except ValidationError as error:
        raise _malformed(path, error) from error


def read_tensors(folder: Path, config: CheckpointConfig) -> dict[str, quantization.FloatArray]:
    """The tensors, de-quantised to float32, after checking the file's hash.

    Raises CheckpointError when the file is missing, not the one that the config names, or not stored as it says.
    """
    path = folder / config.weights.file
    try:
        size = check_regular(path).st_size
        content = path.read_bytes() if size == config.weights.bytes else b""
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    if size != config.weights.bytes:
        raise _damaged(path, f"has {size} bytes, not the {config.weights.bytes} that config.json says")
    if hashlib.sha256(content).hexdigest() != config.weights.sha256:
        raise _damaged(path, "its sha256 is not the one in config.json")
    try:
        stored = load_safetensors(content)
        int8 = config.weights.storage == "int8"
        tensors = quantization.dequantize(stored) if int8 else quantization.only_float32(stored)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # another writer's dtypes and shapes
        raise _damaged(path, f"not a readable file of {config.weights.storage} safetensors ({error})") from error
    if (name := _not_finite(tensors)) is not None:
        raise _damaged(path, f"tensor '{name}' has NaN or infinite values")
    return tensors


def _files(model: MatViT, storage: Storage) -> dict[str, bytes]:
    try:
        _NAME.validate_python(model.name)
    except ValidationError as error:
        raise CheckpointError(
            what="is not a text of at most 200 characters without control characters",
            where="the encoder's name",
            fix="give it another name",
        ) from error
    named = model.vit.state_dict()
    if model.private is not None:
        named |= model.private.state_dict(prefix=_PRIVATE)
    tensors = {name: tensor.detach().float().cpu().numpy() for name, tensor in named.items()}
    _refuse_non_finite(tensors)
    stored, computed = tensors, tensors
    if storage == "int8":
        stored = quantization.quantize(tensors)
        computed = quantization.dequantize(stored)
    weights = save_safetensors({name: stored[name] for name in sorted(stored)})
    _refuse_non_finite(computed)  # rounding to int8 can push the largest float32 over the edge
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
            {name: tensor for name, tensor in computed.items() if not name.startswith(_PRIVATE)},
            model.config,
            model.preprocessing,
        ),
    )
    absent = {"private"} if config.private is None else set()  # older programs refuse fields that they do not know
    return {
        CONFIG: _json(config.model_dump(mode="json", exclude=absent)),
        WEIGHTS: weights,
        PARETO: _table(model.pareto),
        TRAINING: _json(model.record),
        CARD: model_card(model).encode(errors="backslashreplace"),
    }


def _swap(new: Path, target: Path) -> None:
    """Put `new` in `target`'s place; what was there is then at `new`, or under another dotted name."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = _beside(target, "old")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(working_folder, os.fsencode(one), working_folder, os.fsencode(other), exchange)
    return done == 0


def _beside(target: Path, kind: _Kind) -> Path:
    return target.with_name(f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}")


def _remove_leftovers(target: Path) -> None:
    """What this save and killed earlier ones left beside `target`, now that it is whole.

    What another process writes there is young.
    """
    for path in [*filter(_is_abandoned, _leftovers(target, "new")), *_leftovers(target, "old")]:
        shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(unfinished: Path) -> bool:
    try:
        return time.time() - unfinished.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:  # just finished
        return False


def _leftovers(target: Path, kind: _Kind) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]{{8}}")
    return [path for path in target.parent.glob(".*") if name.fullmatch(path.name)]


def _refuse_half_swapped(target: Path) -> None:
    """A save that was killed between its two renames left the earlier checkpoint whole, under another name."""
    if old := next(iter(_leftovers(target, "old")), None):
        raise CheckpointError(
            what="is missing: a save was killed, and the checkpoint before it is beside it under another name",
            where=str(target),
            fix=f"move it back: {shlex.join(['mv', str(old), str(target)])}",
        )


def refuse_to_replace(folder: str | Path) -> Path:
    """The resolved folder, a checkpoint's or one that can be made. CheckpointError for any other.

    Replacing a checkpoint deletes its folder.
    """
    try:
        target = Path(_text(folder)).resolve()
        _refuse_foreign(target)
    except (OSError, ValueError, RuntimeError) as error:  # no folder's name, one that may not be read, links in a loop
        raise CheckpointError(
            what=f"cannot be looked up ({error})", where=os.fspath(folder)[:200], fix="choose another folder"
        ) from error
    return target


def refuse_inside(path: Path) -> None:
    """Raises CheckpointError where `path` lies in a checkpoint's folder, which is replaced only while it is just that.

    Raises OSError where that cannot be looked up.
    """
    for folder in path.resolve().parents:
        if (folder / CONFIG).is_file() and _is_checkpoint(folder):
            raise CheckpointError(
                what=f"lies inside the checkpoint '{folder}', which must hold nothing else",
                where=str(path),
                fix="choose a place outside",
            )


def _refuse_foreign(target: Path) -> None:
    refuse_inside(target)
    above = next(folder for folder in target.parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise CheckpointError(
            what=f"cannot be written: '{above}' is no folder that may be",
            where=str(target),
            fix="choose a new folder for the checkpoint",
        )
    if not target.exists():
        return
    if target.is_dir():
        found = {entry.name for entry in target.iterdir()}
        foreign = found - {CONFIG, WEIGHTS, PARETO, TRAINING, CARD}
        if not found or (not foreign and _is_checkpoint(target)):
            return
        what = (
            f"holds '{min(foreign)}', which is no part of a checkpoint" if foreign else "is not a checkpoint's folder"
        )
    else:
        what = "is a file"
    raise CheckpointError(what=what, where=str(target), fix="choose a new folder for the checkpoint")


def _is_checkpoint(folder: Path) -> bool:
    """Whether config.json is one of ours, of any version: other tools' model folders have one too."""
    try:
        raw = _read_json(folder / CONFIG)
    except CheckpointError:
        return False
    return isinstance(raw, dict) and {"format_version", "space_id"} <= raw.keys()


def _not_finite(tensors: dict[str, quantization.FloatArray]) -> str | None:
    """The name of the first tensor that has NaN or infinite values."""
    return next((name for name, tensor in tensors.items() if not np.isfinite(tensor).all()), None)


def _refuse_non_finite(tensors: dict[str, quantization.FloatArray]) -> None:
    if (name := _not_finite(tensors)) is not None:
        raise CheckpointError(
            what="has NaN or infinite values",
            where=f"tensor '{name}'",
            fix="save an encoder whose training converged",
        )


def _json(value: object) -> bytes:
    # Names of files that are not UTF-8 hold surrogates: as \udcXX, a JSON escape, they come back as they were.
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON with a line for each row."""
    return ("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n").encode(
        errors="backslashreplace"
    )


def _read_json(path: Path, *, missing: Any = None) -> Any:
    try:
        return json.loads(read_small(path))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise CheckpointError(
            what=f"holds no {path.name}", where=str(path.parent), fix="give the folder of a MatViT checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not readable as JSON ({error})") from error


def _read_checked(path: Path, kind: TypeAdapter[Any], *, missing: Any) -> Any:
    """The file's JSON as it stands, if it has the shape of `kind`."""
    raw = _read_json(path, missing=missing)
    try:
        kind.validate_python(raw)
    except ValidationError as error:
        raise _malformed(path, error) from error
    return raw


def _check_specs(model: MatViT, path: Path) -> None:
    for row in model.pareto:
        try:
            model.shape.spec(row["spec"])
        except SpecError as error:
            raise _damaged(path, f"row '{row['name']}': {error.what}") from error


def _is_bundled(source: str | Path) -> bool:
    return isinstance(source, str) and source in bundled_folders()  # a Path is always a folder


def _provenance(source: str | Path, folder: Path) -> tuple[str, str | None]:
    """`MatViT.source` and `.revision`: a hub's branch moves on, so the commit that `folder` holds is kept."""
    if _is_bundled(source):
        return os.fspath(source), None
    if Path(source).is_dir():
        return os.fspath(Path(source).resolve()), None
    return os.fspath(source), folder.name  # the hub client keeps each commit in a folder of its name


def _malformed(path: Path, error: ValidationError) -> CheckpointError:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return _damaged(path, f"field '{field}': {first['msg']}" if field else first["msg"])


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what=what, where=str(path), fix="fetch or save the checkpoint again")


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG, WEIGHTS, PARETO, TRAINING, CARD]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            what=f"is no folder, and cannot be fetched from the hub ({reason})",
            where=repository,
            fix="check the id, the network and HF_TOKEN, or give a local folder",
        ) from error
