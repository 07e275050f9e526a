"""timm's `VisionTransformer` with pre-norm blocks and plain or gated feed-forwards.

Plain ViT, DeiT, DINOv2 up to giant, SigLIP with its attention pooling, with or without class token and registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Attention, LayerNorm, LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from matvit import feed_forward
from matvit.backbone import attention_pool
from matvit.backbone.config import ACTIVATIONS, ViTConfig, activation_name, fill, patch_sizes, refusal, shared_by_blocks


def describe(vit: VisionTransformer) -> ViTConfig:
    """The config of one, its classifier left out. Raises BackboneError when it cannot be made elastic."""
    if vit.global_pool not in {"token", "avg", "avgmax", "max", "map"}:
        raise refusal(f"pooling '{vit.global_pool}' is not supported")
    if not len(vit.blocks):
        raise refusal("it has no blocks")
    side, patch_side = patch_sizes(vit)
    return ViTConfig(
        image_size=side,
        patch_size=patch_side,
        embed_dim=vit.embed_dim,
        **_describe_blocks(vit),
        class_token=vit.cls_token is not None,
        reg_tokens=vit.num_reg_tokens,
        no_embed_class=vit.no_embed_class,
        pos_embed="none" if vit.pos_embed is None else "learn",
        patch_bias=vit.patch_embed.proj.bias is not None,
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        final_norm=not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        fc_norm=not isinstance(vit.fc_norm, nn.Identity),
        pool=vit.global_pool,
        pool_include_prefix=vit.pool_include_prefix,
        **attention_pool.describe(vit),
    )


def build(config: ViTConfig, state: dict[str, torch.Tensor]) -> VisionTransformer:
    """A timm module of this config that holds `state`'s tensors (not copies), in eval mode.

    Raises BackboneError when names or shapes do not match.
    """
    own = {
        "num_heads": 1 if config.head_dim else config.num_heads,  # timm's class has no head_dim: replaced below
        "mlp_ratio": 1.0,  # every FFN is replaced below: timm has one ratio for all blocks
        "norm_layer": partial(LayerNorm, eps=config.norm_eps),
    }
    vit = VisionTransformer(**_timm_arguments(config) | own, weight_init="skip", device="meta")
    _replace_what_timm_cannot_say(vit, config)
    fill(vit, state)
    return vit.eval().requires_grad_(True)


def plain_arguments(config: ViTConfig) -> dict[str, Any] | None:
    """Keyword arguments, in JSON types, with which timm's class alone builds such a module; None: none can say it."""
    width = config.ffn_widths[0]
    ratio = width / config.embed_dim
    expressible = (
        set(config.ffn_widths) == {width}
        and int(config.embed_dim * ratio) == width
        and config.norm_eps == 1e-6  # timm's default; another one would need a Python object
        and config.patch_bias
        and config.head_dim is None
        and config.ffn == "mlp"  # timm names no other layer by text
        and (config.pool != "map" or config.pool_ffn_width == width)  # one ratio for blocks and pooling
    )
    return _timm_arguments(config) | {"mlp_ratio": ratio} if expressible else None


def _timm_arguments(config: ViTConfig) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": 0,
        "global_pool": config.pool,
        "embed_dim": config.embed_dim,
        "depth": len(config.ffn_widths),
        "num_heads": config.num_heads,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "proj_bias": config.proj_bias,
        "init_values": 1.0 if config.layer_scale else None,
        "class_token": config.class_token,
        "pos_embed": config.pos_embed,
        "no_embed_class": config.no_embed_class,
        "reg_tokens": config.reg_tokens,
        "pre_norm": config.pre_norm,
        "final_norm": config.final_norm,
        "fc_norm": config.fc_norm,
        "pool_include_prefix": config.pool_include_prefix,
        "act_layer": config.activation,
    }


def _replace_what_timm_cannot_say(vit: VisionTransformer, config: ViTConfig) -> None:
    activation = ACTIVATIONS[config.activation]
    if not config.patch_bias:
        vit.patch_embed.proj.bias = None
    for block, width in zip(vit.blocks, config.ffn_widths, strict=True):
        if config.head_dim is not None:
            block.attn = Attention(
                config.embed_dim,
                config.num_heads,
                attn_head_dim=config.head_dim,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                proj_bias=config.proj_bias,
                norm_layer=partial(LayerNorm, eps=config.norm_eps),
                device="meta",
            )
        block.mlp = feed_forward.build(
            config.ffn, dim=config.embed_dim, width=width, activation=activation, bias=config.proj_bias
        )
    if config.pool == "map":
        vit.attn_pool = attention_pool.build(
            dim=config.embed_dim,
            heads=config.pool_heads,
            ffn_width=config.pool_ffn_width,
            qkv_bias=config.qkv_bias,
            norm_eps=config.norm_eps,
            activation=activation,
        )


def _describe_blocks(vit: VisionTransformer) -> dict[str, Any]:
    """Each block's FFN width, and what all of them share. Raises BackboneError when they differ in more."""
    for index, block in enumerate(vit.blocks):
        _check_block(block, index)
    kinds = [
        {
            "num_heads": block.attn.num_heads,
            "head_dim": _unusual_head_dim(block.attn),
            "ffn": feed_forward.kind_of(block.mlp),
            "activation": activation_name(block.mlp.act),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "proj_bias": block.attn.proj.bias is not None,
            "layer_scale": isinstance(block.ls1, LayerScale),
        }
        for block in vit.blocks
    ]
    return shared_by_blocks(vit, kinds)


def _check_block(block: Any, index: int) -> None:
    where = f"block {index}"
    if type(block) is not Block:
        raise refusal(f"{where} is a {type(block).__name__}, not a plain pre-norm Block")
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention or type(attn.norm) is not nn.Identity or attn.gate is not None:
        raise refusal(f"{where} has attention of another kind ({type(attn).__name__})")
    if 3 * attn.num_heads * attn.head_dim != attn.qkv.out_features:
        raise refusal(f"{where} has {attn.num_heads} attention heads of another size than its projection")
    if feed_forward.kind_of(mlp) is None:
        raise refusal(f"{where} has a feed-forward of another kind ({type(mlp).__name__})")
    if not isinstance(block.norm1, nn.LayerNorm):
        raise refusal(f"{where} does not use LayerNorm")


def _unusual_head_dim(attn: Attention) -> int | None:
    usual = attn.num_heads * attn.head_dim == attn.qkv.in_features
    return None if usual else attn.head_dim
