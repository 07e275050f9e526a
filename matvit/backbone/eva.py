"""timm's `Eva` with rotary positions as in DINOv3, plain or gated feed-forwards, registers.

Its attention cannot hold fewer heads than the embedding is wide: heads are no axis here. The other models of the
class (EVA-02, Perception Encoder, ...) have positions, norms or attention that this file does not know.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from matvit import feed_forward
from matvit.backbone.config import ACTIVATIONS, ViTConfig, activation_name, fill, patch_sizes, refusal, shared_by_blocks


def describe(vit: Eva) -> ViTConfig:
    """The config of one, its classifier left out. Raises BackboneError when it cannot be made elastic."""
    if vit.global_pool not in {"token", "avg", "avgmax", "max"}:
        raise refusal(f"Eva's pooling '{vit.global_pool}' is not supported")
    if not len(vit.blocks):
        raise refusal("it has no blocks")
    if vit.pos_embed is not None or not _rotates_as_dinov3(vit.rope):
        raise refusal("of timm's Eva models only those with DINOv3's rotary positions are supported")
    norms = [norm for norm in (vit.norm, vit.fc_norm) if not isinstance(norm, nn.Identity)]
    if not isinstance(vit.norm_pre, nn.Identity) or len(norms) != 1:
        raise refusal("it has a norm before its blocks, or not one after them")
    side, patch_side = patch_sizes(vit)
    return ViTConfig(
        family="eva",
        image_size=side,
        patch_size=patch_side,
        embed_dim=vit.embed_dim,
        **_describe_blocks(vit),
        class_token=vit.cls_token is not None,
        reg_tokens=0 if vit.reg_token is None else vit.reg_token.shape[1],
        pos_embed="none",
        fc_norm=not isinstance(vit.fc_norm, nn.Identity),
        pool=vit.global_pool,
        rope_temperature=vit.rope.temperature,
    )


def build(config: ViTConfig, state: dict[str, Tensor]) -> Eva:
    """A timm module of this config that holds `state`'s tensors (not copies), in eval mode.

    Raises BackboneError when names or shapes do not match.
    """
    vit = Eva(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool=config.pool,
        embed_dim=config.embed_dim,
        depth=len(config.ffn_widths),
        num_heads=config.num_heads,
        qkv_bias=config.qkv_bias,
        mlp_ratio=1.0,  # every FFN is replaced below
        norm_layer=partial(LayerNorm, eps=config.norm_eps),
        init_values=1.0 if config.layer_scale else None,
        class_token=config.class_token,
        num_reg_tokens=config.reg_tokens,
        use_abs_pos_emb=False,
        rope_rotate_half=True,
        use_post_transformer_norm=not config.fc_norm,
        use_fc_norm=config.fc_norm,
        device="meta",
    )
    for block, width in zip(vit.blocks, config.ffn_widths, strict=True):
        block.mlp = feed_forward.build(
            config.ffn, dim=config.embed_dim, width=width, activation=ACTIVATIONS[config.activation], bias=True
        )
    fill(vit, state)
    _make_buffers(vit, config)
    return vit.eval().requires_grad_(True)


def _make_buffers(vit: Eva, config: ViTConfig) -> None:
    """What timm computes and keeps out of the state: rotary positions, and zeros as the keys' bias."""
    like = vit.patch_embed.proj.weight
    vit.rope = RotaryEmbeddingDinoV3(
        config.head_width, temperature=config.rope_temperature, feat_shape=vit.patch_embed.grid_size
    ).to(like.device, like.dtype)
    for block in vit.blocks:
        if config.qkv_bias:
            block.attn.k_bias = torch.zeros_like(block.attn.q_bias, requires_grad=False)


def _rotates_as_dinov3(rope: Any) -> bool:
    return type(rope) is RotaryEmbeddingDinoV3 and (
        rope.temperature is not None
        and (rope.min_period is None or rope.max_period is None)
        and (rope.normalize_coords, rope.grid_offset, rope.grid_indexing) == ("separate", 0, "ij")
        and rope.rotate_half
    )


def _describe_blocks(vit: Eva) -> dict[str, Any]:
    """Each block's FFN width, and what all of them share. Raises BackboneError when they differ in more."""
    for index, block in enumerate(vit.blocks):
        _check_block(block, index, vit)
    kinds = [
        {
            "num_heads": block.attn.num_heads,
            "ffn": feed_forward.kind_of(block.mlp),
            "activation": activation_name(block.mlp.act),
            "qkv_bias": block.attn.q_bias is not None,
            "layer_scale": block.gamma_1 is not None,
        }
        for block in vit.blocks
    ]
    return shared_by_blocks(vit, kinds)


def _check_block(block: Any, index: int, vit: Eva) -> None:
    where = f"block {index}"
    if type(block) is not EvaBlock or not isinstance(block.norm1, nn.LayerNorm):
        raise refusal(f"{where} is a {type(block).__name__} of another kind than DINOv3's")
    attn = block.attn
    plain = (
        type(attn) is EvaAttention
        and attn.qkv is not None
        and attn.gate is None
        and all(isinstance(norm, nn.Identity) for norm in (attn.norm, attn.q_norm, attn.k_norm))
        and attn.rotate_half
        and attn.num_heads * attn.head_dim == vit.embed_dim
        and attn.num_prefix_tokens == vit.num_prefix_tokens
    )
    if not plain:
        raise refusal(f"{where} has attention of another kind than DINOv3's ({type(attn).__name__})")
    if feed_forward.kind_of(block.mlp) is None:
        raise refusal(f"{where} has a feed-forward of another kind ({type(block.mlp).__name__})")
    if (block.gamma_1 is None) != (block.gamma_2 is None):
        raise refusal(f"{where} scales one of its two branches only")
