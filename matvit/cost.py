"""Analytic cost of a submodel. Checked in tests against torch's own counter."""

from __future__ import annotations

from matvit.backbone import ViTConfig
from matvit.spec import SubmodelSpec


def flops(config: ViTConfig, spec: SubmodelSpec) -> int:
    """Operations for one picture: 2 x multiply-adds of all matrix products, attention's included."""
    patches = (spec.image_size // config.patch_size) ** 2
    prefix = config.reg_tokens + int(config.class_token)
    tokens = patches + prefix
    dim = config.embed_dim
    attention_dim = config.head_width * spec.heads
    macs = patches * 3 * config.patch_size**2 * dim
    for block in spec.kept_blocks:
        macs += tokens * dim * 3 * attention_dim  # query, key, value
        macs += 2 * tokens * tokens * attention_dim  # scores, and their product with the values
        macs += tokens * attention_dim * dim  # output projection
        macs += (2 + config.gated) * tokens * dim * spec.widths[block]
    if config.pool == "map":  # keys and values, one query's scores, its products, projection and feed-forward
        pooled = patches + prefix * config.pool_include_prefix
        macs += 2 * pooled * dim * (dim + 1) + 2 * dim * (dim + config.pool_ffn_width)
    return 2 * macs


def num_params(config: ViTConfig, spec: SubmodelSpec) -> int:
    """Parameters of the extracted submodel."""
    dim, patches = config.embed_dim, (spec.image_size // config.patch_size) ** 2
    prefix = config.reg_tokens + int(config.class_token)
    total = 3 * config.patch_size**2 * dim + dim * config.patch_bias + prefix * dim
    if config.pos_embed == "learn":
        total += (patches + (0 if config.no_embed_class else prefix)) * dim
    total += 2 * dim * (int(config.pre_norm) + int(config.final_norm))
    if config.pool == "map":  # query, key, value, projection, latent, norm and feed-forward
        bias = dim * (3 * config.qkv_bias + 1)
        total += 4 * dim * dim + bias + dim + 2 * dim + dim * (2 * config.pool_ffn_width + 1) + config.pool_ffn_width
    return total + sum(_block_params(config, spec, block) for block in spec.kept_blocks)


def _block_params(config: ViTConfig, spec: SubmodelSpec, block: int) -> int:
    dim, width = config.embed_dim, spec.widths[block]
    head_dim = config.head_width
    attention_dim = head_dim * spec.heads
    biases = 2 if config.family == "eva" else 3  # Eva's keys have none
    attention = attention_dim * (3 * dim + biases * config.qkv_bias) + dim * (attention_dim + config.proj_bias)
    attention += 4 * head_dim * config.qk_norm
    ffn = (1 + config.gated) * width * (dim + config.proj_bias) + dim * (width + config.proj_bias)
    return attention + ffn + 4 * dim + 2 * dim * config.layer_scale
