"""What S, M and L own changes them alone: XL, and so every index, stays as it is to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from matvit import CheckpointError, MatViT
from matvit.checkpoint import Storage
from matvit.private import PrivateConfig


def test_private_parameters_change_nothing_until_they_are_trained(tiny: MatViT, images: Tensor) -> None:
    space = tiny.space_id
    before = {spec: tiny(images, spec) for spec in ("S", "M", "L", "2S.2L", "XL")}
    tiny.add_private(PrivateConfig(rank=2))
    assert tiny.space_id == space
    for spec, embeddings in before.items():
        torch.testing.assert_close(tiny(images, spec), embeddings, rtol=0, atol=0)


def test_the_full_encoder_owns_nothing(model: MatViT, owning: MatViT, images: Tensor) -> None:
    assert owning.space_id == model.space_id
    for spec in ("XL", "XL-d2", *(["XL-h2"] if model.axes.heads else [])):
        torch.testing.assert_close(owning(images, spec), model(images, spec), rtol=0, atol=0)
        torch.testing.assert_close(owning.extract(spec).state_dict(), model.extract(spec).state_dict(), rtol=0, atol=0)
    assert not torch.allclose(owning(images, "S"), model(images, "S"), atol=1e-3)


def test_each_block_of_a_mixed_spec_uses_its_own_granularitys(tiny: MatViT, images: Tensor) -> None:
    tiny.add_private(PrivateConfig(rank=2))
    assert tiny.private is not None
    tiny(images, "1S.1M.1w7.1XL")[:, 0].sum().backward()
    reached = {
        ".".join(name.split(".")[1:3])
        for name, parameter in tiny.private.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert reached == {"S.0", "M.1"}


def test_training_what_submodels_own_leaves_the_full_encoder_to_the_bit(tiny: MatViT, images: Tensor) -> None:
    space, full, small = tiny.space_id, tiny(images).detach(), tiny(images, "S").detach()
    tiny.add_private(PrivateConfig(rank=2))
    assert tiny.private is not None
    tiny.vit.requires_grad_(False)
    optimiser = torch.optim.AdamW(tiny.private.parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        (1 - (tiny(images, "S") * full).sum(-1)).mean().backward()
        optimiser.step()
    assert tiny.space_id == space
    torch.testing.assert_close(tiny(images), full, rtol=0, atol=0)
    assert (tiny(images, "S") * full).sum() > (small * full).sum()


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_checkpoint_keeps_what_submodels_own_and_the_space(
    model: MatViT, owning: MatViT, tmp_path: Path, storage: Storage, images: Tensor
) -> None:
    model.save_pretrained(tmp_path / "plain", storage=storage)
    owning.save_pretrained(tmp_path / "first", storage=storage)
    plain, first = (MatViT.from_pretrained(tmp_path / name) for name in ("plain", "first"))
    first.save_pretrained(tmp_path / "second", storage=storage)
    second = MatViT.from_pretrained(tmp_path / "second")
    assert plain.space_id == first.space_id == second.space_id
    assert first.weights_sha256 == second.weights_sha256 != plain.weights_sha256
    torch.testing.assert_close(first(images), plain(images), rtol=0, atol=0)
    if storage == "float32":
        torch.testing.assert_close(first(images, "S"), owning(images, "S"), rtol=0, atol=0)
    assert not torch.allclose(first(images, "S"), plain(images, "S"), atol=1e-3)


def test_a_checkpoint_without_them_is_still_version_1(tiny: MatViT, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["format_version"] == 1
    assert "private" not in config


def _edited(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("fields", [{"private": {"rank": 3}}, {"private": None}, {"private": {"rank": 0}}])
def test_other_private_parameters_than_the_config_says_are_refused(
    owning: MatViT, tmp_path: Path, fields: dict[str, object]
) -> None:
    owning.save_pretrained(tmp_path / "owning")
    _edited(tmp_path / "owning", **fields)
    with pytest.raises(CheckpointError, match="private"):
        MatViT.from_pretrained(tmp_path / "owning")


def test_private_tensors_that_a_version_1_checkpoint_does_not_name_are_refused(tiny: MatViT, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "plain")
    weights = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"private.extra": tensors["norm.bias"]}, weights)
    content = weights.read_bytes()
    described = {"file": weights.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _edited(tmp_path / "plain", weights=described | {"storage": "float32"})
    with pytest.raises(CheckpointError, match="not those that config"):
        MatViT.from_pretrained(tmp_path / "plain")
