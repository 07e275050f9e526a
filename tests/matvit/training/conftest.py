"""Recipes of a tiny encoder that the CPU trains in a second, and pictures to train it on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.accelerators import CUDAAccelerator
from PIL import Image

from matvit.training.recipe import Recipe

MakeRecipe = Callable[..., Recipe]

_RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "precision": "32-true",
    "storage": "float32",
    "encoder": {
        "timm_model": "vit_tiny_patch16_224",
        "model_args": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
        "image_size": 32,
        "depth_axis": True,
        "resolution_axis": True,
    },
    "data": [{"path": "shapes", "resolution": 40, "batch": 8}],
    "stages": [
        {"name": "full", "steps": 4, "learning_rate": 1e-3, "full": {"classification": 1}},
        {
            "name": "nested",
            "steps": 4,
            "learning_rate": 1e-3,
            "resolutions": [32, 16],
            "ladder": ["M", "mixed", "S-d1-r16"],
            "full": {"classification": 1, "cosine": 1},
            "submodels": {"classification": 1, "cosine": 1, "similarity": 1, "contrast": 0.5},
        },
    ],
}


def recipe_fields(**changes: Any) -> dict[str, Any]:
    """The tiny recipe as YAML would give it, with some top-level fields replaced."""
    return copy.deepcopy(_RECIPE) | changes


@pytest.fixture
def make_fields() -> Callable[..., dict[str, Any]]:
    return recipe_fields


@pytest.fixture
def make_recipe() -> MakeRecipe:
    return lambda **changes: Recipe.model_validate(recipe_fields(**changes))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one data set, "shapes": two classes of six noisy pictures."""
    root = tmp_path / "data"
    random = np.random.default_rng(0)
    for shade, name in enumerate(("dark", "light")):
        (root / "shapes" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(100 * shade, 100 * shade + 120, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "shapes" / name / f"{number}.png")
    monkeypatch.setenv("MATVIT_DATA", str(root))
    return root


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (torch.cuda, CUDAAccelerator):
        monkeypatch.setattr(cuda, "is_available", lambda: False)
