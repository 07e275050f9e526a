"""Which timm models can be made elastic, and how one is described and built again.

Today: `timm.models.vision_transformer.VisionTransformer` with pre-norm blocks and plain or gated feed-forwards
(plain ViT, DeiT, DINOv2 up to giant, SigLIP with its attention pooling, with or without class token and registers).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import timm.layers.activations
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from timm.layers import Attention, GELUTanh, LayerNorm, LayerScale, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from matvit import attention_pool, feed_forward
from matvit.errors import BackboneError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
Size = Annotated[int, Field(ge=1, le=2**16)]  # a config from elsewhere cannot ask for more than can be built


class ViTConfig(BaseModel):
    """Everything needed to build the timm module that holds the full encoder's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["vit"] = "vit"
    image_size: Size  # pixels, a multiple of patch_size
    patch_size: Size  # pixels
    embed_dim: Size  # a multiple of num_heads
    num_heads: Size
    head_dim: Size | None = None  # None: embed_dim / num_heads; a submodel with fewer heads keeps their width
    ffn_widths: Annotated[tuple[Size, ...], Field(max_length=1000)]  # hidden units of each block
    ffn: feed_forward.Kind = "mlp"
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    reg_tokens: int = Field(default=0, ge=0, le=2**16)
    no_embed_class: bool = False
    pos_embed: Literal["learn", "none"] = "learn"
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    pool: Literal["token", "avg", "avgmax", "max", "map"] = "token"
    pool_include_prefix: bool = False
    pool_heads: int = Field(default=0, ge=0, le=2**16)  # of pooling "map": attention with a learned query
    pool_ffn_width: int = Field(default=0, ge=0, le=2**16)

    @property
    def gated(self) -> bool:
        """Whether the feed-forwards multiply two projections of their input."""
        return self.ffn != "mlp"

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @model_validator(mode="after")
    def _fits_together(self) -> ViTConfig:
        if not self.ffn_widths:
            raise ValueError("there are no blocks")
        uneven = self.head_dim is None and self.embed_dim % self.num_heads
        if self.image_size % self.patch_size or uneven:
            raise ValueError("image_size or embed_dim is not a multiple of patch_size or num_heads")
        if {self.pool == "map"} != {self.pool_heads > 0, self.pool_ffn_width > 0}:
            raise ValueError("pooling 'map', and no other, needs pool_heads and pool_ffn_width")
        if self.pool_heads and self.embed_dim % self.pool_heads:
            raise ValueError("embed_dim is not a multiple of pool_heads")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pooling 'token' needs a class token")
        return self


def describe(vit: Any) -> ViTConfig:
    """The config of a timm model, its classifier left out. Raises BackboneError when it cannot be made elastic."""
    if type(vit) is not VisionTransformer:
        raise _refusal(f"{type(vit).__name__} is not a plain timm VisionTransformer")
    if vit.global_pool not in {"token", "avg", "avgmax", "max", "map"}:
        raise _refusal(f"pooling '{vit.global_pool}' is not supported")
    if not len(vit.blocks):
        raise _refusal("it has no blocks")
    patch = vit.patch_embed
    if type(patch) is not PatchEmbed or not isinstance(patch.norm, nn.Identity):
        raise _refusal(f"its patch embedding is a {type(patch).__name__} with extra layers")
    side, patch_side = (patch.img_size or (0,))[0], patch.patch_size[0]
    square = patch.img_size == (side, side) and patch.patch_size == (patch_side, patch_side)
    if not square or not side or side % patch_side or vit.in_chans != 3:
        raise _refusal("it does not take square RGB pictures of one size in whole square patches")
    return ViTConfig(
        image_size=side,
        patch_size=patch_side,
        embed_dim=vit.embed_dim,
        **_describe_blocks(vit),
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
        **attention_pool.describe(vit),
    )


def build(config: ViTConfig, state: dict[str, torch.Tensor]) -> VisionTransformer:
    """A timm module of this config that holds `state`'s tensors (not copies), in eval mode.

    Raises BackboneError when names or shapes do not match.
    """
    activation = ACTIVATIONS[config.activation]
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool=config.pool,
        embed_dim=config.embed_dim,
        depth=len(config.ffn_widths),
        num_heads=1 if config.head_dim else config.num_heads,  # timm's class has no head_dim: replaced below
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
        act_layer=activation,
        weight_init="skip",
        device="meta",
    )
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
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise _refusal(f"weights do not fit the described model ({str(error).splitlines()[-1].strip()})") from error
    return vit.eval().requires_grad_(True)


def _describe_blocks(vit: VisionTransformer) -> dict[str, Any]:
    """Each block's FFN width, and what all of them share. Raises BackboneError when they differ in more."""
    for index, block in enumerate(vit.blocks):
        _check_block(block, index)
    kinds = [
        {
            "num_heads": block.attn.num_heads,
            "head_dim": _unusual_head_dim(block.attn),
            "ffn": feed_forward.kind_of(block.mlp),
            "activation": _activation_name(block.mlp.act),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "proj_bias": block.attn.proj.bias is not None,
            "layer_scale": isinstance(block.ls1, LayerScale),
        }
        for block in vit.blocks
    ]
    eps = {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) != 1 or any(kind != kinds[0] for kind in kinds):
        raise _refusal("its blocks or norms differ in more than FFN width")
    widths = tuple(block.mlp.fc2.in_features for block in vit.blocks)
    return {"ffn_widths": widths, "norm_eps": eps.pop(), **kinds[0]}


def _check_block(block: Any, index: int) -> None:
    where = f"block {index}"
    if type(block) is not Block:
        raise _refusal(f"{where} is a {type(block).__name__}, not a plain pre-norm Block")
    attn, mlp = block.attn, block.mlp
    # Older timm has neither attn.norm nor attn.gate.
    extras = (getattr(attn, "norm", None), getattr(attn, "gate", None))
    if type(attn) is not Attention or not all(extra is None or type(extra) is nn.Identity for extra in extras):
        raise _refusal(f"{where} has attention of another kind ({type(attn).__name__})")
    if 3 * attn.num_heads * attn.head_dim != attn.qkv.out_features:
        raise _refusal(f"{where} has {attn.num_heads} attention heads of another size than its projection")
    if feed_forward.kind_of(mlp) is None:
        raise _refusal(f"{where} has a feed-forward of another kind ({type(mlp).__name__})")
    if not isinstance(mlp.fc2, nn.Linear) or not isinstance(block.norm1, nn.LayerNorm):
        raise _refusal(f"{where} does not use Linear layers and LayerNorm")


def _unusual_head_dim(attn: Attention) -> int | None:
    usual = attn.num_heads * attn.head_dim == attn.qkv.in_features
    return None if usual else attn.head_dim


def _activation_name(activation: nn.Module) -> Activation:
    if type(activation) is timm.layers.activations.GELU:  # what act_layer="gelu" gives; computes the same
        return "gelu"
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and getattr(activation, "approximate", "none") == "none":
            return name
    raise _refusal(f"its activation {type(activation).__name__} is not supported")


def _refusal(what: str) -> BackboneError:
    return BackboneError(
        what=what,
        where="timm model",
        fix="use a plain timm ViT, DeiT, DINOv2 or SigLIP model (for example vit_small_patch16_224)",
    )
