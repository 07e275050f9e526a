"""int8 storage: small, close, and stable: what was loaded is stored again bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from matvit.preprocess import FloatArray
from matvit.quantization import dequantize, quantize

SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=6)
TINY = float(np.finfo(np.float32).tiny)


def _floats(largest: float) -> st.SearchStrategy[float]:
    return st.floats(-largest, largest, width=32)


@st.composite
def matrices(draw: st.DrawFn) -> FloatArray:
    """Rows of every magnitude: zero, subnormal, at the edge of normal, ordinary, huge."""
    largest = [0.0, 2.0**-145, 2.0**-126, 2.0**-119, 1.0, 2.0**126]
    shape = draw(SHAPES)
    rows = [
        draw(hnp.arrays(np.float32, shape[1:], elements=_floats(draw(st.sampled_from(largest)))))
        for _ in range(shape[0])
    ]
    return np.stack(rows)


@given(matrix=matrices())
def test_quantising_again_changes_nothing(matrix: FloatArray) -> None:
    stored = quantize({"fc.weight": matrix})
    loaded = dequantize(stored)
    again = quantize(loaded)
    assert stored.keys() == again.keys()
    for name, tensor in stored.items():
        assert tensor.tobytes() == again[name].tobytes()
    assert loaded["fc.weight"].tobytes() == dequantize(again)["fc.weight"].tobytes()


@given(matrix=matrices())
def test_the_error_is_at_most_half_a_step_of_the_row(matrix: FloatArray) -> None:
    loaded = dequantize(quantize({"fc.weight": matrix}))["fc.weight"]
    assert loaded.shape == matrix.shape
    assert loaded.dtype == np.float32
    rows, largest = loaded.reshape(len(matrix), -1), np.abs(matrix.reshape(len(matrix), -1)).max(axis=1)
    step = np.maximum(largest.astype(np.float64) / 127 * (1 + 2**-11), TINY)
    error = np.abs(rows.astype(np.float64) - matrix.reshape(len(matrix), -1)).max(axis=1)
    assert (error <= step * 0.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("ulps", [1, 63, 64, 126, 127, 189, 190, 191, 254, 10**4])
def test_subnormal_rows_do_not_wrap_around(ulps: int) -> None:
    """189 smallest steps over 127 rounds to one step in float32: 189 does not fit into int8."""
    row = np.full((1, 2), ulps * 2.0**-149, np.float32)
    loaded = dequantize(quantize({"fc.weight": row}))["fc.weight"]
    assert (loaded >= 0).all()
    assert np.abs(loaded - row).max() <= TINY


def test_only_weight_matrices_are_rounded() -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, FloatArray] = {
        "blocks.0.mlp.fc1.weight": rng.normal(size=(8, 4)).astype(np.float32),
        "patch_embed.proj.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "norm.weight": rng.normal(size=4).astype(np.float32),
        "pos_embed": rng.normal(size=(1, 5, 4)).astype(np.float32),
    }
    stored = quantize(tensors)
    int8 = {name for name, tensor in stored.items() if tensor.dtype == np.int8}
    assert int8 == {"blocks.0.mlp.fc1.weight.int8", "patch_embed.proj.weight.int8"}
    loaded = dequantize(stored)
    assert loaded.keys() == tensors.keys()
    for name in ("norm.weight", "pos_embed"):
        np.testing.assert_array_equal(loaded[name], tensors[name])


def test_a_tensor_that_is_merely_named_scale_is_kept() -> None:
    tensors = {"ls.scale": np.ones(4, np.float32), "fc.weight": np.ones((2, 3), np.float32)}
    assert dequantize(quantize(tensors)).keys() == tensors.keys()


def test_a_matrix_that_is_not_int8_with_a_scale_is_refused() -> None:
    matrix = {"fc.weight": np.ones((2, 3), np.float32)}
    stored = quantize(matrix)
    for wrong in (matrix, {"fc.weight.int8": stored["fc.weight.int8"]}, stored | {"fc.weight.int8": np.ones((2, 3))}):
        with pytest.raises(ValueError, match=r"fc\.weight"):
            dequantize(wrong)
