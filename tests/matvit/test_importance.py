"""Importance order: XL's function stays, and the units that matter come first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from matvit import MatViT
from matvit.importance import find_keep_order, order_by_importance
from matvit.model import AxesConfig


def test_ordering_keeps_the_full_encoder(model: MatViT, images: Tensor) -> None:
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ordered = copy.deepcopy(model).to(dtype)
        before = ordered(images.to(dtype))
        order_by_importance(ordered, images.to(dtype))
        torch.testing.assert_close(ordered(images.to(dtype)), before, rtol=0, atol=atol)


def test_ordering_permutes_units_and_heads_and_nothing_else(model: MatViT, images: Tensor) -> None:
    ordered = copy.deepcopy(model)
    order_by_importance(ordered, images)
    for name, tensor in ordered.vit.state_dict().items():
        before = model.vit.state_dict()[name]
        if ".mlp.fc1" in name or ".attn.qkv." in name:
            assert sorted(tensor.tolist()) == sorted(before.tolist())
        elif name.endswith(("fc2.weight", "attn.proj.weight")):
            assert sorted(tensor.T.tolist()) == sorted(before.T.tolist())
        else:
            assert torch.equal(tensor, before)


def test_important_units_come_first(tiny: MatViT, images: Tensor) -> None:
    """All but eight scattered units do nothing: after ordering, the first eight are the full encoder."""
    useful = torch.tensor([3, 17, 40, 41, 77, 90, 111, 127])
    with torch.no_grad():
        for block in tiny.vit.blocks:
            silent = torch.ones(128, dtype=torch.bool)
            silent[useful] = False
            block.mlp.fc2.weight[:, silent] = 0
    before = tiny(images)
    assert not torch.allclose(tiny(images, "4w8"), before, atol=1e-3)
    order_by_importance(tiny, images)
    torch.testing.assert_close(tiny(images, "4w8"), before, rtol=0, atol=1e-5)


def test_importance_sees_through_layer_scale(dinov2: MatViT, images: Tensor) -> None:
    """Units whose output layer scale switches off come last, however large their weights are."""
    with torch.no_grad():
        for block in dinov2.vit.blocks:
            block.ls2.gamma[:16] = 0
            block.mlp.fc2.weight[:16, :64] *= 100
            block.mlp.fc2.weight[16:, :64] = 0
    before = dinov2(images)
    order_by_importance(dinov2, images)
    torch.testing.assert_close(dinov2(images, "L"), before, rtol=0, atol=1e-5)


def test_ordering_leaves_no_hooks_and_is_seen_by_the_space_id(tiny: MatViT, images: Tensor) -> None:
    before = tiny.space_id
    order_by_importance(tiny, images)
    assert not any(module._forward_pre_hooks for module in tiny.modules())
    assert tiny.space_id != before


def test_blocks_that_do_nothing_are_the_first_to_go(tiny: MatViT, images: Tensor) -> None:
    with torch.no_grad():
        for index in (1, 2):
            tiny.vit.blocks[index].attn.proj.weight.zero_()
            tiny.vit.blocks[index].attn.proj.bias.zero_()
            tiny.vit.blocks[index].mlp.fc2.weight.zero_()
            tiny.vit.blocks[index].mlp.fc2.bias.zero_()
    order = find_keep_order(tiny, images)
    assert sorted(order) == [0, 1, 2, 3]
    assert set(order[2:]) == {1, 2}
    before = tiny(images)
    tiny.open_axes(AxesConfig(keep_order=order))
    torch.testing.assert_close(tiny(images, "XL-d2"), before, rtol=0, atol=1e-5)


def test_ordering_heads_keeps_the_full_encoder_and_puts_the_useful_ones_first(model: MatViT, images: Tensor) -> None:
    if not model.axes.heads:
        pytest.skip("its attention holds all heads")
    ordered = copy.deepcopy(model)  # cut along every axis
    with torch.no_grad():
        for block in ordered.vit.blocks:
            by_head = block.attn.proj.weight.view(32, 4, 8)
            by_head[:, [0, 2]] = 0
    before = ordered(images)
    order_by_importance(ordered, images)
    torch.testing.assert_close(ordered(images), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(ordered(images, "XL-h2"), before, rtol=0, atol=1e-5)


def test_heads_stay_where_they_are_when_they_are_no_axis(tiny: MatViT, images: Tensor) -> None:
    before = tiny.vit.blocks[0].attn.qkv.weight.clone()
    order_by_importance(tiny, images)
    torch.testing.assert_close(tiny.vit.blocks[0].attn.qkv.weight, before, rtol=0, atol=0)
