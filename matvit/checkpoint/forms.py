"""The files of a checkpoint: their names, their forms, and how each is read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
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

from matvit import backbone
from matvit.errors import CheckpointError
from matvit.model import AxesConfig, MatViT
from matvit.preprocess import FloatArray
from matvit.private import PrivateConfig
from matvit.regular import read_small

FORMAT_VERSION = 2  # written only where version 1 has no place for what is to be kept
FILES = CONFIG, WEIGHTS, PARETO, TRAINING, CARD = (
    "config.json",
    "model.safetensors",
    "pareto.json",
    "training.json",
    "README.md",
)
Storage = Literal["float32", "int8"]
PRIVATE = "private."  # begins the names of the tensors that submodels own


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
NAME: TypeAdapter[str] = TypeAdapter(_Name)


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


ROWS: TypeAdapter[list[ParetoRow]] = TypeAdapter(list[ParetoRow])
RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


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


def read_config(folder: Path) -> CheckpointConfig:
    """config.json, checked. Raises CheckpointError when it is missing, malformed, or of a newer format."""
    path = folder / CONFIG
    raw = read_json(path)
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
        raise malformed(path, error) from error


def read_json(path: Path, *, missing: Any = None) -> Any:
    """The file's JSON; `missing`, unless that is None, where there is none. Raises CheckpointError."""
    try:
        return json.loads(read_small(path))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise CheckpointError(
            what=f"holds no {path.name}", where=str(path.parent), fix="give the folder of a MatViT checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not readable as JSON ({error})") from error


def read_checked(path: Path, kind: TypeAdapter[Any], *, missing: Any) -> Any:
    """The file's JSON as it stands, if it has the shape of `kind`."""
    raw = read_json(path, missing=missing)
    try:
        kind.validate_python(raw)
    except ValidationError as error:
        raise malformed(path, error) from error
    return raw


def to_json(value: object) -> bytes:
    """One value a line."""
    return _encoded(json.dumps(value, indent=1, ensure_ascii=False))


def rows_to_json(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A line for each row."""
    return _encoded("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]")


def _encoded(text: str) -> bytes:
    # Names of files that are not UTF-8 hold surrogates: as \udcXX, a JSON escape, they come back as they were.
    return f"{text}\n".encode(errors="backslashreplace")


def not_finite(tensors: dict[str, FloatArray]) -> str | None:
    """The name of the first tensor that has NaN or infinite values."""
    return next((name for name, tensor in tensors.items() if not np.isfinite(tensor).all()), None)


def malformed(path: Path, error: ValidationError) -> CheckpointError:
    """The error for a file whose JSON has not its form: it names the first field that is wrong."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return damaged(path, f"field '{field}': {first['msg']}" if field else first["msg"])


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a checkpoint of which a file is not what was saved."""
    return CheckpointError(what=what, where=str(path), fix="fetch or save the checkpoint again")
