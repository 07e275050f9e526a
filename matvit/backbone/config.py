"""How a backbone is described: the config that a checkpoint holds, of every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import timm.layers.activations
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from timm.layers import GELUTanh, PatchEmbed, QuickGELU
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from matvit import feed_forward
from matvit.errors import BackboneError

TimmViT: TypeAlias = VisionTransformer | Eva
TimmBlock: TypeAlias = Block | EvaBlock
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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: Literal["vit", "eva"] = "vit"  # timm's VisionTransformer, or its Eva with rotary positions (DINOv3)
    image_size: Size  # pixels, a multiple of patch_size
    patch_size: Size  # pixels
    embed_dim: Size  # a multiple of num_heads, unless head_dim is given
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
    rope_temperature: PositiveFloat | None = None  # of rotary positions, which family "eva" has in place of a table

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
        self._check_family()
        return self

    def _check_family(self) -> None:
        eva = self.family == "eva"
        if eva != (self.rope_temperature is not None):
            raise ValueError("family 'eva', and no other, has a rope_temperature")
        never = self.head_dim or self.qk_norm or self.pre_norm or self.pool_include_prefix or self.pool == "map"
        always = self.proj_bias and self.patch_bias and self.final_norm and self.pos_embed == "none"
        if eva and (never or not always or self.head_width % 4):
            raise ValueError("family 'eva' is not built like that")


def patch_sizes(vit: TimmViT) -> tuple[int, int]:
    """Pixels a side of its pictures and of their patches. Raises BackboneError for anything but plain squares."""
    patch = vit.patch_embed
    if type(patch) is not PatchEmbed or not isinstance(patch.norm, nn.Identity):
        raise refusal(f"its patch embedding is a {type(patch).__name__} with extra layers")
    side, patch_side = (patch.img_size or (0,))[0], patch.patch_size[0]
    square = patch.img_size == (side, side) and patch.patch_size == (patch_side, patch_side)
    if not square or not side or side % patch_side or vit.in_chans != 3:
        raise refusal("it does not take square RGB pictures of one size in whole square patches")
    return side, patch_side


def shared_by_blocks(vit: TimmViT, kinds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The config's fields of each block's FFN width, and of what `kinds`, one for each block, agree in.

    Raises BackboneError when the blocks, or the norms' eps, differ in more.
    """
    eps = {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) != 1 or any(kind != kinds[0] for kind in kinds):
        raise refusal("its blocks or norms differ in more than FFN width")
    widths = tuple(block.mlp.fc2.in_features for block in vit.blocks)
    return {"ffn_widths": widths, "norm_eps": eps.pop(), **kinds[0]}


def fill(vit: TimmViT, state: dict[str, Tensor]) -> None:
    """Gives a module without values `state`'s tensors (not copies). Raises BackboneError when they do not fit."""
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise refusal(f"weights do not fit the described model ({str(error).splitlines()[-1].strip()})") from error


def activation_name(activation: nn.Module) -> Activation:
    """Its name in the config. Raises BackboneError for one that is not supported."""
    if type(activation) is timm.layers.activations.GELU:  # what act_layer="gelu" gives; computes the same
        return "gelu"
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and getattr(activation, "approximate", "none") == "none":
            return name
    raise refusal(f"its activation {type(activation).__name__} is not supported")


def refusal(what: str) -> BackboneError:
    """The error for a model that cannot be made elastic because of `what`."""
    return BackboneError(
        what=what,
        where="timm model",
        fix="use a plain timm ViT, DeiT, DINOv2, DINOv3 or SigLIP model (for example vit_small_patch16_224)",
    )
