"""A submodel as plain timm weights: a safetensors file, and a JSON file beside it that says how to build the module.

FILE.safetensors    tensors under timm's names
FILE.json           how to build, feed and read the module: `ExtractedConfig`

timm alone builds the module, unless its blocks differ in width: then `read_extracted` does.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from matvit import backbone
from matvit.checkpoint import refuse_inside, refuse_unwritable
from matvit.checkpoint.forms import PreprocessingConfig
from matvit.durable import remove_unfinished, write_together
from matvit.errors import BackboneError, CheckpointError, first_line
from matvit.extraction import say_how_to_prepare
from matvit.model import MatViT
from matvit.preprocess import Preprocessing
from matvit.regular import check_regular, read_small

FORMAT: Literal["matvit-extracted"] = "matvit-extracted"
_TimmClass = Literal["timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva"]
_TIMM_CLASSES: dict[str, _TimmClass] = {
    "vit": "timm.models.vision_transformer.VisionTransformer",
    "eva": "timm.models.eva.Eva",
}


class ExtractedConfig(BaseModel):
    """The JSON file beside extracted weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["matvit-extracted"] = FORMAT
    format_version: Literal[1] = 1
    encoder: str  # name of the elastic encoder that it was cut from
    spec: str
    space_id: str  # L2-normalised outputs compare with every index of this space
    sha256: str  # of the safetensors file
    preprocessing: PreprocessingConfig
    architecture: backbone.ViTConfig
    timm_class: _TimmClass = _TIMM_CLASSES["vit"]
    timm_arguments: dict[str, Any] | None  # None: timm cannot build it from plain arguments, as with mixed widths


def write_extracted(model: MatViT, spec: str, *, out: Path) -> tuple[Path, ExtractedConfig]:
    """Cuts `spec` out of `model` and writes both files, each atomically; gives the JSON file's path and content.

    Raises SpecError for an unknown spec, and CheckpointError for an `out` whose name does not end in
    .safetensors, inside a checkpoint's folder, where nothing can be written, or where a file stands that an earlier
    extraction did not write.
    """
    sidecar = out.with_suffix(".json")
    _refuse_to_replace(out, sidecar)
    chosen = model.shape.spec(spec)
    vit = model.extract(chosen)
    weights = save({name: tensor.contiguous() for name, tensor in vit.state_dict().items()})
    architecture = backbone.describe(vit)
    config = ExtractedConfig(
        encoder=model.name,
        spec=str(chosen),
        space_id=model.space_id,
        sha256=hashlib.sha256(weights).hexdigest(),
        preprocessing=PreprocessingConfig(**model.preprocessing.to_json()),
        architecture=architecture,
        timm_class=_TIMM_CLASSES[architecture.family],
        timm_arguments=backbone.plain_arguments(architecture),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (sidecar, out):
        remove_unfinished(path)
    # The JSON file first: it says that both are ours, should the other never be renamed.
    write_together({sidecar: (config.model_dump_json(indent=2) + "\n").encode(), out: weights})
    return sidecar, config


def read_extracted(path: str | os.PathLike[str]) -> backbone.TimmViT:
    """The timm module that `write_extracted` wrote to `path`, in eval mode.

    Raises CheckpointError when one of the two files is missing, damaged, or not the other's.
    """
    path = Path(path)
    try:
        config = ExtractedConfig.model_validate_json(read_small(path.with_suffix(".json")))
        check_regular(path)
        weights = path.read_bytes()
        if hashlib.sha256(weights).hexdigest() != config.sha256:
            raise _damaged(path, "its sha256 is not the one in the JSON file beside it")
        vit = backbone.build(config.architecture, load(weights))
        preprocessing = Preprocessing(**config.preprocessing.model_dump())
        say_how_to_prepare(vit, preprocessing, image_size=config.architecture.image_size)
        return vit
    except BackboneError as error:
        raise _damaged(path, error.what) from error
    except (OSError, ValidationError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise _damaged(path, f"it or the JSON file beside it cannot be read ({reason})") from error


def _refuse_to_replace(out: Path, sidecar: Path) -> None:
    if out.suffix != ".safetensors":
        raise CheckpointError(
            what="is no .safetensors file", where=str(out), fix="give a name that ends in .safetensors"
        )
    refuse_inside(out)
    refuse_unwritable(out)
    present = [path for path in (sidecar, out) if path.exists()]
    if present and not _is_ours(sidecar):
        raise CheckpointError(
            what="is there already, and is no extracted submodel", where=str(present[0]), fix="give another name"
        )


def _is_ours(sidecar: Path) -> bool:
    """Whether an extraction wrote it, of any version."""
    try:
        raw = json.loads(read_small(sidecar))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what=what, where=str(path), fix="extract it again")
