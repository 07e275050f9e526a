"""The FFN axis: a submodel keeps the first hidden units of every block's feed-forward, plain or gated.

Letters: B batch, N tokens, D embedding, F hidden units, w hidden units kept.
    mlp          fc2(act(fc1 x))                    fc1 has F rows
    packed_glu   fc2(act(a) * b), [a, b] = fc1 x    fc1 has 2 F rows: the same rows of both halves are kept
    swiglu       fc2(act(fc1_g x) * fc1_x x)        fc1_g and fc1_x have F rows each
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from matvit.heads import linear

FeedForward = Any  # timm's Mlp, GluMlp or SwiGLU
Kind = Literal["mlp", "packed_glu", "swiglu"]
KINDS: dict[Kind, type[nn.Module]] = {"mlp": Mlp, "packed_glu": GluMlp, "swiglu": SwiGLU}


def kind_of(mlp: nn.Module) -> Kind | None:
    """Which feed-forward it is; None for one that is not supported."""
    for kind, timm_class in KINDS.items():
        if type(mlp) is timm_class and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc2, nn.Linear):
            gated_first = kind != "packed_glu" or not mlp.gate_last
            return kind if gated_first else None
    return None


def build(kind: Kind, *, dim: int, width: int, activation: type[nn.Module], bias: bool) -> FeedForward:
    """A feed-forward of `width` hidden units without values, on the meta device."""
    if kind == "packed_glu":
        return GluMlp(dim, 2 * width, act_layer=activation, bias=bias, gate_last=False, device="meta")
    return KINDS[kind](dim, width, act_layer=activation, bias=bias, device="meta")


def nested_ffn(mlp: FeedForward, tokens: Tensor, width: int) -> Tensor:
    """The FFN on its first `width` hidden units: (B, N, D) -> (B, N, D), computing only the slices.

    Source: MatFormer, arXiv 2310.07707, section 3.1.
    """
    return F.linear(hidden_units(mlp, tokens, width), mlp.fc2.weight[:, :width], mlp.fc2.bias)


def hidden_units(mlp: FeedForward, tokens: Tensor, width: int) -> Tensor:
    """What the first `width` hidden units give: (B, N, D) -> (B, N, w)."""
    first, *value = (F.linear(tokens, *part) for part in _incoming(mlp, width))  # (B, N, w) each
    activated: Tensor = mlp.act(first)
    return activated * value[0] if value else activated


def slices(mlp: FeedForward, width: int) -> dict[int, object]:
    """By the id of each of its layers, a copy cut to `width` hidden units: a memo for `copy.deepcopy`."""
    parts = _incoming(mlp, width)
    cut: dict[int, object] = {id(mlp.fc2): linear(mlp.fc2.weight[:, :width], mlp.fc2.bias)}
    if isinstance(mlp, GluMlp):  # both halves in one layer
        weights, biases = zip(*parts, strict=True)
        joined = linear(torch.cat(weights), None if biases[0] is None else torch.cat(biases))
        # What is joined without gradients being recorded has forgotten whether it is trained.
        cut[id(mlp.fc1)] = joined.requires_grad_(mlp.fc1.weight.requires_grad)
        return cut
    return cut | {id(layer): linear(*part) for layer, part in zip(_incoming_layers(mlp), parts, strict=True)}


def sliced_parameters(mlp: FeedForward, width: int) -> dict[str, Tensor]:
    """The tensors of the first `width` hidden units, by their names in `mlp`; gradients reach its own."""
    tensors: dict[str, Tensor] = {}
    for name, whole in mlp.named_parameters():
        if name == "fc2.weight":
            tensors[name] = whole[:, :width]
        elif name.startswith("fc2."):
            tensors[name] = whole
        else:  # the hidden units' rows: once, or a packed gate's and its value's
            halves = torch.split(whole, mlp.fc2.in_features)
            tensors[name] = torch.cat([half[:width] for half in halves])
    return tensors


def permute(mlp: FeedForward, order: Tensor) -> None:
    """Reorders the hidden units in place: unit i becomes what unit order[i] was."""
    for layer in _incoming_layers(mlp):
        rows = torch.cat([order, order + len(order)]) if layer.out_features == 2 * len(order) else order
        layer.weight.copy_(layer.weight[rows])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[rows])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])


def _incoming_layers(mlp: FeedForward) -> list[nn.Linear]:
    return [mlp.fc1_g, mlp.fc1_x] if isinstance(mlp, SwiGLU) else [mlp.fc1]


def _incoming(mlp: FeedForward, width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the first `width` hidden units; for gated ones the gate's, then the value's."""
    starts = [0, mlp.fc2.in_features] if isinstance(mlp, GluMlp) else [0]
    return [
        (layer.weight[start : start + width], None if layer.bias is None else layer.bias[start : start + width])
        for layer in _incoming_layers(mlp)
        for start in starts
    ]
