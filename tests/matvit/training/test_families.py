"""Every family of backbones trains from a local file of its weights: what users with better weights do."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from matvit import MatViT
from matvit.errors import RecipeError
from matvit.training.loop import train

SIZES = {"depth": 2, "embed_dim": 32, "num_heads": 2}
DINOV3 = SIZES | {"global_pool": "token"}


@pytest.mark.parametrize(
    ("name", "arguments", "pixels"),
    [
        ("vit_small_patch14_dinov2", SIZES, 28),
        ("vit_giant_patch14_reg4_dinov2", SIZES, 28),
        ("vit_small_patch16_dinov3", DINOV3, 32),
        ("vit_small_plus_patch16_dinov3", DINOV3, 32),
        ("vit_base_patch16_siglip_224", SIZES, 32),
    ],
)
def test_a_recipe_trains_from_a_local_file(data, make_recipe, make_fields, tmp_path, name, arguments, pixels):
    torch.manual_seed(2)
    start = timm.create_model(name, num_classes=0, **arguments)
    save_file(start.state_dict(), tmp_path / "weights.safetensors")
    encoder = {
        "timm_model": name,
        "model_args": arguments,
        "weights": str(tmp_path / "weights.safetensors"),
        "image_size": pixels,
        "resolution_axis": True,
        "depth_axis": True,
    }
    full, nested = make_fields()["stages"]
    nested |= {"resolutions": [pixels, pixels // 2], "ladder": ["M", "mixed", f"S-d1-r{pixels // 2}"]}
    own = {
        "name": "own",
        "steps": 2,
        "learning_rate": 1e-3,
        "private": 2,
        "freeze": True,
        "ladder": ["S", "M"],
        "submodels": {"cosine": 1, "contrast": 0.5},
    }
    model = train(make_recipe(encoder=encoder, stages=[full, nested, own]), out=tmp_path / "run")
    begun = MatViT.from_timm(start, image_size=pixels).vit.state_dict()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not torch.equal(model.vit.blocks[0].mlp.fc2.weight.sum(), begun["blocks.0.mlp.fc2.weight"].sum())
    loaded = MatViT.from_pretrained(tmp_path / "run" / "encoder")
    images = torch.randn(2, 3, pixels, pixels)
    for spec in ("XL", "S"):
        torch.testing.assert_close(loaded(images, spec), model(images, spec), rtol=0, atol=1e-5)


def test_weights_of_another_model_are_one_sentence(data, make_recipe, tmp_path):
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    encoder = {"timm_model": "vit_small_patch16_dinov3", "model_args": SIZES, "image_size": 32}
    recipe = make_recipe(encoder=encoder | {"weights": str(tmp_path / "weights.safetensors")})
    with pytest.raises(RecipeError, match="start weights cannot be loaded") as caught:
        train(recipe, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
