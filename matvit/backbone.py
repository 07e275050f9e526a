"""Which timm models can be made elastic, and how one is described and built again.

Today: `timm.models.vision_transformer.VisionTransformer` with plain blocks and `Mlp` feed-forwards
(plain ViT, DeiT, DINOv2 with layer scale, with or without class token and registers).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from timm.layers import Attention, GELUTanh, LayerNorm, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from matvit.errors import BackboneError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


class ViTConfig(BaseModel):
    """Everything needed to build the timm module that holds the full encoder's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["vit"] = "vit"
    image_size: int  # pixels
    patch_size: int  # pixels
    embed_dim: int
    num_heads: int
    ffn_widths: tuple[int, ...]  # hidden units of each block
    activation: str = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pos_embed: Literal["learn", "none"] = "learn"
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    pool: Literal["token", "avg", "avgmax", "max"] = "token"
    pool_include_prefix: bool = False


def describe(vit: Any) -> ViTConfig:
    """The config of a timm model. Raises BackboneError when it cannot be made elastic."""
    if type(vit) is not VisionTransformer:
        raise _refusal(f"{type(vit).__name__} is not a plain timm VisionTransformer")
    if vit.attn_pool is not None or vit.global_pool not in {"token", "avg", "avgmax", "max"}:
        raise _refusal(f"pooling '{vit.global_pool}' is not supported")
    patch = vit.patch_embed
    if type(patch) is not PatchEmbed or not isinstance(patch.norm, nn.Identity):
        raise _refusal(f"its patch embedding is a {type(patch).__name__} with extra layers")
    (height, width), (patch_height, patch_width) = patch.img_size, patch.patch_size
    if height != width or patch_height != patch_width or vit.in_chans != 3:
        raise _refusal("it does not take square RGB pictures in square patches")
    for index, block in enumerate(vit.blocks):
        _check_block(block, index)
    block = vit.blocks[0]
    return ViTConfig(
        image_size=height,
        patch_size=patch_height,
        embed_dim=vit.embed_dim,
        num_heads=block.attn.num_heads,
        ffn_widths=tuple(block.mlp.fc1.out_features for block in vit.blocks),
        activation=_activation_name(block.mlp.act),
        norm_eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        proj_bias=block.attn.proj.bias is not None,
        layer_scale=isinstance(block.ls1, LayerScale),
        class_token=vit.cls_token is not None,
        reg_tokens=vit.num_reg_tokens,
        no_embed_class=vit.no_embed_class,
        pos_embed="none" if vit.pos_embed is None else "learn",
        patch_bias=patch.proj.bias is not None,
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        final_norm=not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        fc_norm=not isinstance(vit.fc_norm, nn.Identity),
        pool=vit.global_pool,
        pool_include_prefix=vit.pool_include_prefix,
    )


def build(config: ViTConfig, state: dict[str, torch.Tensor]) -> VisionTransformer:
    """A timm module of this config that holds `state`'s tensors (not copies), in eval mode.

    Raises BackboneError when names or shapes do not match.
    """
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool=config.pool,
        embed_dim=config.embed_dim,
        depth=len(config.ffn_widths),
        num_heads=config.num_heads,
        mlp_ratio=1.0,  # every FFN is replaced below: timm has one ratio for all blocks
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        proj_bias=config.proj_bias,
        init_values=1.0 if config.layer_scale else None,
        class_token=config.class_token,
        pos_embed=config.pos_embed,
        no_embed_class=config.no_embed_class,
        reg_tokens=config.reg_tokens,
        pre_norm=config.pre_norm,
        final_norm=config.final_norm,
        fc_norm=config.fc_norm,
        pool_include_prefix=config.pool_include_prefix,
        norm_layer=partial(LayerNorm, eps=config.norm_eps),
        act_layer=ACTIVATIONS[config.activation],
        weight_init="skip",
        device="meta",
    )
    if not config.patch_bias:
        vit.patch_embed.proj.bias = None
    for block, width in zip(vit.blocks, config.ffn_widths, strict=True):
        block.mlp = Mlp(
            config.embed_dim, width, act_layer=ACTIVATIONS[config.activation], bias=config.proj_bias, device="meta"
        )
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise _refusal(f"weights do not fit the described model ({str(error).splitlines()[-1].strip()})") from error
    return vit.eval().requires_grad_(True)


def _check_block(block: Any, index: int) -> None:
    where = f"block {index}"
    if type(block) is not Block:
        raise _refusal(f"{where} is a {type(block).__name__}, not a plain pre-norm Block")
    if type(block.attn) is not Attention or not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
        raise _refusal(f"{where} has attention of another kind ({type(block.attn).__name__})")
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        raise _refusal(f"{where} has a feed-forward of another kind ({type(block.mlp).__name__})")
    if not isinstance(block.mlp.fc1, nn.Linear) or not isinstance(block.norm1, nn.LayerNorm):
        raise _refusal(f"{where} does not use Linear layers and LayerNorm")


def _activation_name(activation: nn.Module) -> str:
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and getattr(activation, "approximate", "none") == "none":
            return name
    raise _refusal(f"its activation {type(activation).__name__} is not supported")


def _refusal(what: str) -> BackboneError:
    return BackboneError(
        what=what,
        where="timm model",
        fix="use a plain timm ViT, DeiT or DINOv2 model with Mlp blocks (for example vit_small_patch16_224)",
    )
