"""Tiny vision transformers of every accepted family, with no weight at its starting value."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm, QuickGELU, SwiGLU, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from matvit import MatViT
from matvit.model import AxesConfig
from matvit.private import PrivateConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deit3": {"no_embed_class": True, "init_values": 1e-6, "global_pool": "avg", "fc_norm": True},
    "dinov2": {"init_values": 1e-5},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "no-class-token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "clip": {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5), "act_layer": QuickGELU},
    "qk-norm": {"qk_norm": True, "act_layer": "gelu_tanh"},
    "no-bias": {"qkv_bias": False, "proj_bias": False, "act_layer": "gelu"},
    "giant": {"mlp_layer": SwiGLUPacked, "mlp_ratio": 8, "act_layer": nn.SiLU, "init_values": 1e-5, "reg_tokens": 2},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "no-positions": {"pos_embed": "none", "global_pool": "avgmax", "pool_include_prefix": True, "final_norm": False},
}
EVA: dict[str, Any] = {
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
EVA_FAMILIES: dict[str, dict[str, Any]] = {
    "dinov3": {"qkv_bias": False, "num_reg_tokens": 4, "init_values": 1e-5},
    "dinov3-plus": {"num_reg_tokens": 4, "swiglu_mlp": True, "swiglu_align_to": 8, "global_pool": "token"},
    "dinov3-packed": {"class_token": False, "swiglu_mlp": True, "use_fc_norm": True},
}


def build_vit(family: str, **overrides: Any) -> Any:
    """A timm module of 4 blocks, 32 wide, for 32 px pictures; equal calls give equal weights."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0}
    vit: Any
    if family in EVA_FAMILIES:
        vit = Eva(**(sizes | EVA | EVA_FAMILIES[family] | overrides))
    else:
        vit = VisionTransformer(**(sizes | FAMILIES[family] | overrides))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return vit.eval()


def all_axes(model: MatViT) -> AxesConfig:
    """Every axis that its family has."""
    return AxesConfig(heads=model.config.family == "vit", keep_order=(3, 0, 1, 2), image_size_step=8)


@pytest.fixture(scope="session", params=[*FAMILIES, *EVA_FAMILIES])
def vit(request: pytest.FixtureRequest) -> VisionTransformer:
    """One timm module per family; shared, so tests leave it as it is."""
    return build_vit(request.param)


@pytest.fixture(scope="session")
def model(vit: VisionTransformer) -> MatViT:
    """The elastic encoder of `vit`, cut along every axis; shared, so tests leave it as it is."""
    model = MatViT.from_timm(vit)
    model.open_axes(all_axes(model))
    return model


@pytest.fixture(scope="session")
def owning(vit: VisionTransformer) -> MatViT:
    """The same, with private parameters that change what S, M and L compute; shared, so tests leave it as it is."""
    model = MatViT.from_timm(vit)
    model.open_axes(all_axes(model))
    model.add_private(PrivateConfig(rank=2))
    assert model.private is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.private.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def plain_vit() -> VisionTransformer:
    """A module of the plain family that a test may change."""
    return build_vit("plain")


@pytest.fixture
def dinov3_vit() -> Any:
    """An Eva of the DINOv3 family that a test may change."""
    return build_vit("dinov3")


@pytest.fixture
def dinov2() -> MatViT:
    """An elastic encoder with layer scale that a test may change."""
    return MatViT.from_timm(build_vit("dinov2"))


@pytest.fixture
def tiny() -> MatViT:
    """A plain elastic encoder that a test may change."""
    return MatViT.from_timm(build_vit("plain"))


@pytest.fixture(scope="session")
def images() -> Tensor:
    """(3, 3, 32, 32), as if normalised."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
