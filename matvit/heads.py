"""The attention heads axis: a submodel keeps the first heads of every block.

Letters: B batch, N tokens, D embedding, H heads, d width of a head.
"""

from __future__ import annotations

import copy
from typing import TypeAlias

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

TimmAttention: TypeAlias = Attention | EvaAttention  # the latter holds all of its heads, always


def nested_attention(attention: TimmAttention, tokens: Tensor, heads: int, rope: Tensor | None = None) -> Tensor:
    """Self-attention with the first `heads` heads: (B, N, D) -> (B, N, D), computing only the slices."""
    if heads == attention.num_heads:
        full: Tensor = attention(tokens) if rope is None else attention(tokens, rope=rope)
        return full
    batch, count, _ = tokens.shape
    width = heads * attention.head_dim
    bias = None if attention.qkv.bias is None else head_rows(attention.qkv.bias, attention, heads)
    projected = F.linear(tokens, head_rows(attention.qkv.weight, attention, heads), bias)
    split = projected.reshape(batch, count, 3, heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)  # (B, H, N, d) each
    seen = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
    joined = seen.transpose(1, 2).reshape(batch, count, width)
    return F.linear(joined, attention.proj.weight[:, :width], attention.proj.bias)


def head_rows(stacked: Tensor, attention: Attention, heads: int) -> Tensor:
    """The first `heads` heads' rows of query, key and value: (3 H d, ...) -> (3 heads d, ...)."""
    by_head = stacked.view(3, attention.num_heads, attention.head_dim, *stacked.shape[1:])
    return by_head[:, :heads].flatten(0, 2)


def cut_heads(attention: TimmAttention, heads: int) -> TimmAttention:
    """A copy of `attention` that holds its first `heads` heads only."""
    memo: dict[int, object] = {}
    if heads != attention.num_heads:
        width = heads * attention.head_dim
        bias = attention.qkv.bias
        memo[id(attention.qkv)] = linear(
            head_rows(attention.qkv.weight, attention, heads),
            None if bias is None else head_rows(bias, attention, heads),
        )
        memo[id(attention.proj)] = linear(attention.proj.weight[:, :width], attention.proj.bias)
    small: TimmAttention = copy.deepcopy(attention, memo)
    small.num_heads = heads
    small.attn_dim = heads * small.head_dim
    return small


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer that holds copies of these, trainable as they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer
