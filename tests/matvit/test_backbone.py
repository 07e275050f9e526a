"""Which timm models become elastic, and that every other one is refused in one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from timm.layers import Attention, GluMlp, RotaryEmbeddingCat, SwiGLU
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from matvit import BackboneError, MatViT, SpecError, backbone
from matvit.model import AxesConfig

ACCEPTED = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32},
    "vit_small_patch14_dinov2": {"img_size": 28},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_base_patch16_clip_224": {"img_size": 32},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 32},
    "vit_base_patch16_siglip_gap_224": {"img_size": 32},
    "vit_betwixt_patch16_reg4_gap_256": {"img_size": 32},
    "vit_medium_patch16_gap_240": {"img_size": 32},
    "test_vit2": {"img_size": 32},
    "flexivit_small": {"img_size": 32},
    "vit_giant_patch14_dinov2": {"img_size": 28, "embed_dim": 96, "num_heads": 4},
    "vit_base_patch16_siglip_224": {"img_size": 32},
    "vit_small_patch16_dinov3": {"img_size": 32},
    "vit_small_plus_patch16_dinov3": {"img_size": 32, "global_pool": "token"},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 32},
    "vit_small_patch16_lingbot": {"img_size": 32},
}
REFUSED = {
    "eva02_tiny_patch14_224": "only those with DINOv3's rotary positions",
    "eva_giant_patch14_224": "only those with DINOv3's rotary positions",
    "vit_small_patch16_rope_mixed_224": "only those with DINOv3's rotary positions",
    "vit_pe_core_base_patch16_224": "pooling 'map'",
    "naflexvit_base_patch16_gap": "NaFlexVit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "samvit_base_patch16": "VisionTransformerSAM",
    "beit_base_patch16_224": "Beit",
    "cait_xxs24_224": "Cait",
    "hiera_tiny_224": "Hiera",
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_tiny": "ConvNeXt",
    "aimv2_large_patch14_224": "patch embedding",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_tiny_r_s16_p8_224": "patch embedding",
    "deit_tiny_distilled_patch16_224": "VisionTransformerDistilled",
    "resnet18": "ResNet",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_plain_timm_family_is_accepted(name: str) -> None:
    vit = timm.create_model(name, depth=2, num_classes=0, **ACCEPTED[name]).eval()
    side = ACCEPTED[name]["img_size"]
    images = torch.randn(1, 3, side, side)
    model = MatViT.from_timm(vit)
    with torch.no_grad():
        torch.testing.assert_close(model(images), F.normalize(vit(images), dim=-1), rtol=0, atol=1e-5)
    assert model.num_params() == sum(parameter.numel() for parameter in vit.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_in_one_sentence(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    with pytest.raises(BackboneError, match=REFUSED[name]) as caught:
        MatViT.from_timm(module)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_model", "vit_small_patch16_224.no_such_weights", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(BackboneError, match="timm cannot create it") as caught:
        MatViT.from_timm(name)
    assert "\n" not in str(caught.value)


def _set(path: str, value: object) -> Callable[[VisionTransformer], None]:
    def change(vit: VisionTransformer) -> None:
        parent, _, name = path.rpartition(".")
        setattr(vit.get_submodule(parent), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set("blocks.2.mlp", SwiGLU(32, 64, act_layer=nn.GELU)), "differ in more than FFN width"),
        (_set("blocks.2.mlp", GluMlp(32, 64)), "GluMlp"),
        (_set("blocks.1.mlp.norm", nn.LayerNorm(128)), "block 1 has a feed-forward of another kind"),
        (_set("blocks.1.mlp.act", nn.Tanh()), "activation Tanh"),
        (_set("blocks.1.mlp.act", nn.ReLU()), "differ in more than FFN width"),
        (_set("blocks.1.attn.num_heads", 2), "heads of another size"),
        (_set("blocks.1.attn", Attention(32, num_heads=2, qkv_bias=True)), "differ in more than FFN width"),
        (_set("blocks.1.attn", Attention(32, num_heads=4, attn_head_dim=4, qkv_bias=True)), "differ in more"),
        (_set("blocks.1.attn", Attention(32, num_heads=4, gated=True)), "attention of another kind"),
        (_set("blocks.1.attn.norm", nn.LayerNorm(32)), "attention of another kind"),
        (_set("norm.eps", 1e-3), "differ in more than FFN width"),
        (_set("patch_embed.img_size", (32, 24)), "square"),
        (_set("patch_embed.img_size", None), "square"),
        (_set("patch_embed.norm", nn.LayerNorm(32)), "patch embedding"),
        (_set("blocks", nn.Sequential()), "no blocks"),
    ],
)
def test_a_changed_module_is_refused_not_misread(
    plain_vit: VisionTransformer, change: Callable[[VisionTransformer], None], why: str
) -> None:
    change(plain_vit)
    with pytest.raises(BackboneError, match=why):
        MatViT.from_timm(plain_vit)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set("rope", None), "rotary positions"),
        (_set("rope", RotaryEmbeddingCat(8, feat_shape=[4, 4], rotate_half=True)), "rotary positions"),
        (_set("rope.rotate_half", False), "rotary positions"),
        (_set("rope.normalize_coords", "max"), "rotary positions"),
        (_set("norm_pre", nn.LayerNorm(32)), "norm before its blocks"),
        (_set("fc_norm", nn.LayerNorm(32)), "not one after them"),
        (_set("global_pool", ""), "pooling"),
        (_set("blocks", nn.ModuleList()), "no blocks"),
        (_set("blocks.1.attn.norm", nn.LayerNorm(32)), "attention of another kind"),
        (_set("blocks.1.attn.gate", nn.Linear(32, 32)), "attention of another kind"),
        (_set("blocks.1.attn.rotate_half", False), "attention of another kind"),
        (_set("blocks.1.gamma_2", None), "scales one of its two branches"),
        (_set("blocks.1.mlp.act", nn.ReLU()), "differ in more than FFN width"),
        (_set("blocks.1.mlp.norm", nn.LayerNorm(128)), "feed-forward of another kind"),
        (_set("blocks.1.norm1", nn.Identity()), "of another kind than DINOv3's"),
    ],
)
def test_a_changed_dinov3_is_refused_not_misread(dinov3_vit: Any, change: Callable[[Any], None], why: str) -> None:
    change(dinov3_vit)
    with pytest.raises(BackboneError, match=why):
        MatViT.from_timm(dinov3_vit)


def test_dinov3_has_no_axis_of_heads(dinov3_vit: Any, images: Tensor) -> None:
    model = MatViT.from_timm(dinov3_vit)
    with pytest.raises(SpecError, match="cannot be cut to fewer heads"):
        model.open_axes(AxesConfig(heads=True))
    assert model(images, "S").shape == (3, 32)


def test_config_round_trips_and_builds_the_same_module(vit: VisionTransformer, images: Tensor) -> None:
    config = backbone.describe(vit)
    again = backbone.ViTConfig.model_validate_json(config.model_dump_json())
    assert again == config
    built = backbone.build(again, copy.deepcopy(vit.state_dict()))
    assert backbone.describe(built) == config
    torch.testing.assert_close(built(images), vit(images), rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(plain_vit: VisionTransformer) -> None:
    config = backbone.describe(plain_vit)
    state = plain_vit.state_dict()
    del state["norm.bias"]
    with pytest.raises(BackboneError, match=r"norm\.bias"):
        backbone.build(config, state)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 30},
        {"num_heads": 5},
        {"num_heads": 0},
        {"ffn_widths": []},
        {"ffn_widths": [0]},
        {"ffn_widths": [768] * 100_000},
        {"image_size": 10**12},
        {"embed_dim": 2**64},
        {"reg_tokens": 10**12},
        {"activation": "swish"},
        {"class_token": False},
        {"pool": "map"},
        {"pool_heads": 4},
        {"pool": "map", "pool_heads": 5, "pool_ffn_width": 8},
        {"norm_eps": 0},
        {"family": "eva"},
        {"rope_temperature": 100},
        {"family": "eva", "rope_temperature": 100},
        {"extra": 1},
    ],
)
def test_configs_that_cannot_be_built_are_refused(plain_vit: VisionTransformer, change: dict[str, Any]) -> None:
    raw = json.loads(backbone.describe(plain_vit).model_dump_json()) | change
    with pytest.raises(ValidationError):
        backbone.ViTConfig.model_validate(raw)


def test_weights_that_do_not_fit_the_largest_config_are_refused_too() -> None:
    most = 2**16
    config = backbone.ViTConfig(
        image_size=most, patch_size=1, embed_dim=most, num_heads=most, ffn_widths=(most,), reg_tokens=most
    )
    with pytest.raises(BackboneError, match="weights do not fit"):
        backbone.build(config, {})


def test_pretrained_weights_of_a_local_timm_checkpoint(tmp_path: Path) -> None:
    """timm's own pretrained path, weights and preprocessing included, from a folder instead of the network."""
    vit = timm.create_model("test_vit", img_size=32).eval()
    save_for_hf(vit, str(tmp_path), safe_serialization=True, model_args={"img_size": 32})
    model = MatViT.from_timm(f"local-dir:{tmp_path}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), F.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert model.preprocessing.mean == tuple(vit.pretrained_cfg["mean"])
    assert model.name == tmp_path.name


def test_pretrained_weights_given_through_timms_overlay(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit")
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
    )
    model = MatViT.from_timm(loaded)
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])


def test_pretrained_weights_of_a_module_are_refused() -> None:
    with pytest.raises(BackboneError, match="pretrained: goes with a timm name"):
        MatViT.from_timm(timm.create_model("test_vit"), pretrained=True)


def test_pretrained_weights_that_cannot_be_had_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="timm cannot create it") as caught:
        MatViT.from_timm(f"local-dir:{tmp_path / 'missing'}", pretrained=True)
    assert "\n" not in str(caught.value)
