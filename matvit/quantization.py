"""int8 weights with one scale per output channel, for small files; computing stays in float32.

The scales have 12-bit mantissas, so that scale x integer is exact in float32 and de-quantised
weights quantise again to the same integers and scales: saving a loaded checkpoint changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from matvit.preprocess import FloatArray

Tensors = dict[str, npt.NDArray[np.generic]]

_INTEGERS, _SCALES = ".int8", ".scale"  # suffixes of the two stored tensors


def quantize(tensors: Mapping[str, FloatArray]) -> Tensors:
    """Weight matrices (two or more dimensions, name ending in "weight") become int8 + scales; others stay.

    Tensors must be finite; magnitudes up to 2^126 survive.
    """
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if _is_rounded(name, tensor):
            stored[name + _INTEGERS], stored[name + _SCALES] = _quantize(tensor)
        else:
            stored[name] = tensor
    return stored


def dequantize(stored: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, FloatArray]:
    """The float32 tensors that `quantize` stored; names and shapes as before.

    Raises ValueError for a matrix that is not stored as int8 with a float32 scale for each row, or another
    tensor that is not float32.
    """
    tensors: Tensors = {}
    for name, tensor in stored.items():
        base = name.removesuffix(_INTEGERS)
        if base != name and tensor.dtype == np.int8 and base + _SCALES in stored:
            scale = stored[base + _SCALES]
            if scale.dtype != np.float32 or scale.shape != tensor.shape[:1]:
                raise ValueError(f"tensor '{base + _SCALES}' is not a float32 for each row")
            with np.errstate(over="ignore", invalid="ignore"):  # checkpoints tell of infinite values
                tensors[base] = tensor.astype(np.float32) * scale.view(np.float32).reshape(-1, *[1] * (tensor.ndim - 1))
        elif _is_rounded(base, tensor):
            raise ValueError(f"tensor '{name}' is not int8 with a scale")
        elif name.removesuffix(_SCALES) + _INTEGERS not in stored:
            tensors[name] = tensor
    return only_float32(tensors)


def only_float32(tensors: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, FloatArray]:
    """The same tensors. Raises ValueError when one is not float32."""
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"tensor '{name}' is {tensor.dtype}")
    return {name: tensor.view(np.float32) for name, tensor in tensors.items()}


def _is_rounded(name: str, tensor: npt.NDArray[np.generic]) -> bool:
    return tensor.ndim >= 2 and name.endswith("weight")


def _quantize(weight: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    rows = weight.reshape(weight.shape[0], -1)
    # Below the smallest normal number, scale x integer would not be exact: such rows round to zero.
    scale = np.maximum(_round_up_to_12_bits(np.abs(rows).max(axis=1) / np.float32(127)), np.finfo(np.float32).tiny)
    integers = np.rint(rows / scale[:, None]).astype(np.int8)
    return integers.reshape(weight.shape), scale


def _round_up_to_12_bits(values: FloatArray) -> FloatArray:
    mantissa, exponent = np.frexp(values)
    rounded: FloatArray = np.ldexp(np.ceil(mantissa * 4096) / 4096, exponent).astype(np.float32)
    return rounded
