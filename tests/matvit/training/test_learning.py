"""The method works: after training, a small query encoder finds its class in the full encoder's gallery."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from matvit import MatViT
from matvit.datasets import LabelledImages, read_dataset
from matvit.training.loop import train
from matvit_data import demo_photos


@pytest.fixture
def groceries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelledImages:
    """324 demo photographs of 81 products, 4 of each, as a class-folder data set."""
    for photo in demo_photos():
        if photo.data_set == "grocery-store":
            folder = tmp_path / "groceries" / photo.class_name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo.file, folder)
    monkeypatch.setenv("MATVIT_DATA", str(tmp_path))
    return read_dataset(tmp_path / "groceries")


def recall_against_full_gallery(model: MatViT, images: LabelledImages, *, spec: str) -> float:
    """Share of pictures whose nearest other picture, gallery XL, is of their class."""
    pixels = torch.from_numpy(model.preprocessing.batch(list(images.images), size=model.config.image_size))
    with torch.no_grad():
        similar = model(pixels, spec) @ model(pixels).T
    nearest = similar.fill_diagonal_(-2).argmax(dim=1)
    labels = torch.from_numpy(images.labels)
    return (labels[nearest] == labels).float().mean().item()


def test_small_queries_find_the_classes_of_the_training_pictures_far_better_than_chance_and_truncation(
    groceries, make_recipe, tmp_path
):
    augmentation = {"scale": [0.7, 1.0], "colour_jitter": 0.1, "grayscale": 0.0}
    full = {
        "name": "full",
        "steps": 160,
        "learning_rate": 2e-3,
        "full": {"classification": 1},
        "augmentation": augmentation,
    }
    nested = {
        "name": "nested",
        "steps": 160,
        "learning_rate": 2e-3,
        "full": {"classification": 1, "cosine": 2},
        "submodels": {"classification": 1, "cosine": 1, "similarity": 2, "contrast": 0.5},
        "augmentation": augmentation,
    }
    common = {
        "encoder": {
            "timm_model": "vit_tiny_patch16_224",
            "model_args": {"depth": 4, "embed_dim": 64, "num_heads": 2, "patch_size": 8},
            "image_size": 32,
        },
        "data": [{"path": "groceries", "resolution": 64, "batch": 64}],
        "optimiser": {"layer_decay": 1.0},
    }
    trained = train(make_recipe(**common, stages=[full, nested]), out=tmp_path / "run")
    truncated = copy.deepcopy(trained)  # the first stage's full encoder, which the run kept as its anchor
    truncated.vit.load_state_dict(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["anchor"])

    chance = 3 / 323
    small = recall_against_full_gallery(trained, groceries, spec="S")
    assert small > 10 * chance
    assert small > 2.2 * recall_against_full_gallery(truncated, groceries, spec="S")
    assert small > 0.7 * recall_against_full_gallery(trained, groceries, spec="XL")
