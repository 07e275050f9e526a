"""One transformer block, cut as a submodel computes it, whatever the backbone's family.

Letters in shape comments: B batch, N tokens, D embedding.
"""

from __future__ import annotations

from typing import Literal

from timm.layers import LayerScale
from timm.models.eva import EvaBlock
from torch import Tensor

from matvit.backbone import TimmBlock
from matvit.feed_forward import nested_ffn
from matvit.heads import nested_attention


def run_block(block: TimmBlock, tokens: Tensor, width: int, heads: int, rope: Tensor | None = None) -> Tensor:
    """timm's pre-norm block, cut to `width` hidden units and `heads` attention heads: (B, N, D) -> (B, N, D).

    `rope`: rotary positions of the patches, for the family that has them.
    """
    tokens = tokens + _scaled(block, 1, nested_attention(block.attn, block.norm1(tokens), heads, rope))
    return tokens + _scaled(block, 2, nested_ffn(block.mlp, block.norm2(tokens), width))


def layer_scale(block: TimmBlock, branch: Literal[1, 2]) -> Tensor | None:
    """The learned scale (D,) of the attention (1) or the feed-forward (2); None for a block without."""
    if isinstance(block, EvaBlock):
        gamma: Tensor | None = block.gamma_1 if branch == 1 else block.gamma_2
        return gamma
    scale = block.ls1 if branch == 1 else block.ls2
    return scale.gamma if isinstance(scale, LayerScale) else None


def _scaled(block: TimmBlock, branch: Literal[1, 2], tokens: Tensor) -> Tensor:
    gamma = layer_scale(block, branch)
    return tokens if gamma is None else tokens * gamma
