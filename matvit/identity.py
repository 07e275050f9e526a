"""`space_id`: the identity of an embedding space, which an index and a query encoder must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from matvit.preprocess import Preprocessing


def space_id(tensors: Mapping[str, npt.NDArray[Any]], config: BaseModel, preprocessing: Preprocessing) -> str:
    """sha256 (hex) over the full encoder's float32 tensors, its config, and the preprocessing.

    Names, shapes and dtypes are hashed with the bytes; file format, quantised storage and submodels
    do not enter, so saving, loading and tuning small submodels beside a frozen full one keep it.
    """
    digest = hashlib.sha256()
    described = {"encoder": config.model_dump(mode="json"), "preprocessing": preprocessing.to_json()}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        digest.update(tensor.data)
    return digest.hexdigest()
