"""Extraction: the plain timm module computes what the nested forward computes, and a slice of a slice is a slice."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from matvit import MatViT, SubmodelSpec, backbone

HEADS = st.integers(1, 4)
DEPTHS = st.integers(1, 4)
RESOLUTIONS = st.sampled_from([8, 16, 24, 32, 40])
WIDTHS = st.tuples(*[st.integers(1, 128)] * 4) | st.sampled_from([16, 32, 64, 128]).map(lambda width: (width,) * 4)


def _heads(model: MatViT, heads: int) -> int:
    return heads if model.axes.heads else model.shape.num_heads


def _equal(model: MatViT, spec: SubmodelSpec, images: Tensor, atol: float) -> None:
    with torch.no_grad():
        extracted = F.normalize(model.extract(spec)(images), dim=-1)
        torch.testing.assert_close(extracted, model(images, spec), rtol=0, atol=atol)


@settings(max_examples=8)
@given(widths=WIDTHS, heads=HEADS, depth=DEPTHS, resolution=RESOLUTIONS)
def test_extracted_encoder_equals_nested_forward(
    model: MatViT, widths: tuple[int, ...], heads: int, depth: int, resolution: int
) -> None:
    spec = SubmodelSpec.of(model.shape, widths, heads=_heads(model, heads), depth=depth, image_size=resolution)
    images = torch.randn(2, 3, resolution, resolution)
    _equal(model, spec, images, 1e-5)
    _equal(copy.deepcopy(model).double(), spec, images.double(), 1e-12)


@settings(max_examples=8)
@given(sizes=st.tuples(*[st.sampled_from([16, 32, 64, 128, 7])] * 4), heads=HEADS, depth=DEPTHS, pixels=RESOLUTIONS)
def test_what_submodels_own_is_merged_when_they_are_extracted(
    owning: MatViT, sizes: tuple[int, ...], heads: int, depth: int, pixels: int
) -> None:
    spec = SubmodelSpec.of(owning.shape, sizes, heads=_heads(owning, heads), depth=depth, image_size=pixels)
    images = torch.randn(2, 3, pixels, pixels)
    _equal(owning, spec, images, 1e-5)
    _equal(copy.deepcopy(owning).double(), spec, images.double(), 1e-12)
    small = owning.extract(spec)
    assert sum(parameter.numel() for parameter in small.parameters()) == owning.num_params(spec)
    assert small.state_dict().keys() <= owning.vit.state_dict().keys()


@settings(max_examples=20)
@given(data=st.data(), small=WIDTHS, depth=DEPTHS)
def test_a_slice_of_a_slice_is_a_slice(model: MatViT, data: st.DataObject, small: tuple[int, ...], depth: int) -> None:
    middle = data.draw(st.tuples(*(st.integers(width, 128) for width in small)))
    once = model.extract(SubmodelSpec.of(model.shape, small, depth=depth))
    parent = MatViT.from_timm(model.extract(SubmodelSpec.of(model.shape, middle)))
    parent.open_axes(model.axes)
    twice = parent.extract(SubmodelSpec.of(parent.shape, small, depth=depth))
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)


def test_extracted_module_is_plain_timm_and_really_smaller(model: MatViT) -> None:
    small = model.extract("2S.2M")
    assert type(small) is type(model.vit)
    assert not small.training
    assert [block.mlp.fc2.in_features for block in small.blocks] == [16, 16, 32, 32]
    for block in small.blocks:
        width = block.mlp.fc2.in_features
        incoming = [layer.weight for name, layer in block.mlp.named_children() if name.startswith("fc1")]
        gated = model.config.gated
        assert sum(weight.shape[0] for weight in incoming) == (1 + gated) * width
        assert block.mlp.fc2.weight.untyped_storage().nbytes() == block.mlp.fc2.weight.numel() * 4  # no view of XL
    small.reset_classifier(5)
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_an_encoder_of_fewer_heads_is_described_and_built_again(model: MatViT, images: Tensor) -> None:
    if not model.axes.heads:
        pytest.skip("its attention holds all heads")
    small = model.extract("M-h3")
    assert [block.attn.num_heads for block in small.blocks] == [3] * 4
    assert small.blocks[0].attn.qkv.weight.shape == (3 * 3 * 8, 32)
    config = backbone.describe(small)
    assert (config.num_heads, config.head_dim) == (3, 8)
    again = backbone.build(config, small.state_dict())
    torch.testing.assert_close(again(images), small(images), rtol=0, atol=0)


def test_dropped_blocks_leave_and_the_others_keep_their_order(model: MatViT) -> None:
    small = model.extract("S-d2")  # keep order 3, 0, 1, 2
    weights = [block.norm1.weight for block in small.blocks]
    assert len(weights) == 2
    torch.testing.assert_close(weights, [model.vit.blocks[index].norm1.weight for index in (0, 3)])


def test_timm_knows_how_to_prepare_pictures_for_an_extracted_module_and_which_blocks_it_has(model: MatViT) -> None:
    small = model.extract("S-d2-r48")
    assert [stage["module"] for stage in small.feature_info] == ["blocks.0", "blocks.1"]
    config = resolve_model_data_config(small)
    assert (config["input_size"], config["mean"], config["std"]) == (
        (3, 48, 48),
        model.preprocessing.mean,
        model.preprocessing.std,
    )
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    ours = model.preprocessing(picture, size=48)
    theirs = create_transform(**config)(picture)
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1.01 / 255 / min(config["std"]))


def test_a_resolution_is_what_timm_makes_of_it(vit: VisionTransformer, model: MatViT) -> None:
    resized = copy.deepcopy(vit)
    resized.set_input_size(img_size=(48, 48))
    pictures = torch.randn(2, 3, 48, 48)
    small = model.extract("XL-r48")
    assert small.patch_embed.img_size == (48, 48)
    torch.testing.assert_close(small(pictures), resized(pictures), rtol=0, atol=1e-5)


def test_extraction_shares_nothing_with_its_parent(tiny: MatViT) -> None:
    before = copy.deepcopy(tiny.state_dict())
    small = tiny.extract("S")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    torch.testing.assert_close(tiny.state_dict(), before, rtol=0, atol=0)


def test_extraction_keeps_dtype_and_frozen_parameters(tiny: MatViT) -> None:
    frozen: list[Any] = list(tiny.double().requires_grad_(False).extract("S").parameters())
    assert {parameter.dtype for parameter in frozen} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(parameter.requires_grad for parameter in tiny.requires_grad_(True).extract("S").parameters())
