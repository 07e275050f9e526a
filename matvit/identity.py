"""`space_id`: the identity of an embedding space, which an index and a query encoder must share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from matvit.preprocess import Preprocessing

VERSION = "space-v1"
# The keys that space-v1 always hashes; never change them. A field that is added later is hashed only
# when it differs from its default, so that encoders from before it keep their identity: its default
# must be what they compute.
ENCODER_KEYS = (
    *("family", "image_size", "patch_size", "embed_dim", "num_heads", "ffn_widths", "activation", "norm_eps"),
    *("qkv_bias", "qk_norm", "proj_bias", "layer_scale", "class_token", "reg_tokens", "no_embed_class", "pos_embed"),
    *("patch_bias", "pre_norm", "final_norm", "fc_norm", "pool", "pool_include_prefix"),
)
PREPROCESSING_KEYS = ("mean", "std", "crop", "resize", "jpeg_scale")


def space_id(tensors: Mapping[str, npt.NDArray[Any]], config: BaseModel, preprocessing: Preprocessing) -> str:
    """sha256 (hex) over the full encoder's float32 tensors, its config, and the preprocessing.

    Names, shapes and dtypes are hashed with the bytes; file format, quantised storage and submodels
    do not enter, so saving, loading and tuning small submodels beside a frozen full one keep it.
    """
    encoder_defaults = {name: field.default for name, field in type(config).model_fields.items()}
    preprocessing_defaults = {field.name: field.default for field in dataclasses.fields(preprocessing)}
    described = {
        "encoder": _hashed(config.model_dump(mode="json"), ENCODER_KEYS, encoder_defaults),
        "preprocessing": _hashed(preprocessing.to_json(), PREPROCESSING_KEYS, preprocessing_defaults),
        "version": VERSION,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _hashed(values: Mapping[str, Any], always: tuple[str, ...], defaults: Mapping[str, Any]) -> dict[str, Any]:
    neutral = to_jsonable_python(defaults, fallback=repr)  # JSON has lists where Python has tuples
    return {name: value for name, value in values.items() if name in always or value != neutral[name]}
