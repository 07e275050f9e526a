"""`space_id` does not move: not with the program's version, not with fields that older encoders never had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from matvit.backbone import ViTConfig
from matvit.identity import ENCODER_KEYS, PREPROCESSING_KEYS, space_id
from matvit.preprocess import Preprocessing

SIZES: dict[str, Any] = {"image_size": 28, "patch_size": 14, "embed_dim": 4, "num_heads": 2, "ffn_widths": (8, 16)}
COLOURS: dict[str, Any] = {"mean": (0.5, 0.25, 0), "std": (1, 0.5, 0.25)}
TENSORS: dict[str, Any] = {
    "norm.weight": np.arange(4, dtype=np.float32) / 8,
    "blocks.0.mlp.fc1.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
}
GOLDEN = "38843b1495d304f16c413dc6908ba0f70dc72f1dfd7f96afe79b5bc429e0ea9a"


def test_the_identity_of_version_1_never_changes() -> None:
    assert space_id(TENSORS, ViTConfig(**SIZES), Preprocessing(**COLOURS)) == GOLDEN


class _LaterConfig(ViTConfig):
    rope: bool = False
    windows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaterPreprocessing(Preprocessing):
    crop_share: float = 1.0


def test_a_field_added_later_enters_only_where_it_differs_from_its_default() -> None:
    assert space_id(TENSORS, _LaterConfig(**SIZES), _LaterPreprocessing(**COLOURS)) == GOLDEN
    assert space_id(TENSORS, _LaterConfig(**SIZES, windows=(7,)), Preprocessing(**COLOURS)) != GOLDEN
    assert space_id(TENSORS, ViTConfig(**SIZES), _LaterPreprocessing(**COLOURS, crop_share=0.9)) != GOLDEN


@pytest.mark.parametrize(
    "change",
    [{"norm_eps": 1e-5}, {"layer_scale": True}, {"activation": "relu"}, {"num_heads": 4}, {"ffn_widths": (16, 8)}],
)
def test_what_changes_the_function_changes_the_identity(change: dict[str, Any]) -> None:
    assert space_id(TENSORS, ViTConfig(**SIZES | change), Preprocessing(**COLOURS)) != GOLDEN


def test_every_listed_key_exists() -> None:
    """A key that was renamed would drop out of the identity in silence."""
    assert set(ENCODER_KEYS) <= set(ViTConfig.model_fields)
    assert set(PREPROCESSING_KEYS) <= set(Preprocessing(**COLOURS).to_json())
