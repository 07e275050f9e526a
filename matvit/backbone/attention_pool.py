"""Attention pooling ("map", SigLIP): one learned query attends to the tokens; every submodel keeps all of it."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import AttentionPoolLatent, LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from matvit.errors import BackboneError


def describe(vit: VisionTransformer) -> dict[str, Any]:
    """Its fields in the config; none for a model that pools otherwise. Raises BackboneError for another kind of it."""
    pool = vit.attn_pool
    if pool is None:
        return {}
    first = vit.blocks[0]
    plain = (
        type(pool) is AttentionPoolLatent
        and (pool.latent_len, pool.latent_dim, pool.pool) == (1, vit.embed_dim, "token")
        and pool.pos_embed is None
        and isinstance(pool.q, nn.Linear)
        and isinstance(pool.q_norm, nn.Identity)
        and isinstance(pool.norm, nn.LayerNorm)
        and pool.mlp is not None
        and type(pool.mlp.act) is type(first.mlp.act)
        and (pool.q.bias is None) == (first.attn.qkv.bias is None)
        and pool.out_features == vit.embed_dim
    )
    if not plain:
        raise BackboneError(
            what=f"its attention pooling is of another kind ({type(pool).__name__})",
            where="timm model",
            fix="use a timm SigLIP model (for example vit_base_patch16_siglip_224)",
        )
    return {"pool_heads": pool.num_heads, "pool_ffn_width": pool.mlp.fc1.out_features}


def build(*, dim: int, heads: int, ffn_width: int, qkv_bias: bool, norm_eps: float, activation: type[nn.Module]) -> Any:
    """A pooling layer without values, on the meta device."""
    pool = AttentionPoolLatent(
        dim,
        num_heads=heads,
        mlp_ratio=1.0,
        qkv_bias=qkv_bias,
        norm_layer=partial(LayerNorm, eps=norm_eps),
        act_layer=activation,
        device="meta",
    )
    pool.mlp.fc1 = nn.Linear(dim, ffn_width, device="meta")  # a ratio would be rounded
    pool.mlp.fc2 = nn.Linear(ffn_width, dim, device="meta")
    return pool
