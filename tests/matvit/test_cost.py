"""Analytic FLOPs and parameters are those of torch's counter and of the extracted module."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matvit import EncoderShape, MatViT, SubmodelSpec
from matvit.backbone import ViTConfig
from matvit.cost import flops

CONFIG = ViTConfig(image_size=32, patch_size=8, embed_dim=32, num_heads=4, ffn_widths=(128,) * 4)
SHAPE = EncoderShape(
    ffn_widths=CONFIG.ffn_widths,
    num_heads=4,
    image_size=32,
    head_axis=True,
    keep_order=(0, 3, 1, 2),
    image_size_step=8,
)
WIDTHS = st.tuples(*[st.integers(1, 128)] * 4)


@settings(max_examples=8)
@given(widths=WIDTHS, heads=st.integers(1, 4), depth=st.integers(1, 4), resolution=st.sampled_from([8, 24, 32, 40]))
def test_flops_and_parameters_equal_the_real_counts(
    model: MatViT, widths: tuple[int, ...], heads: int, depth: int, resolution: int
) -> None:
    heads = heads if model.axes.heads else 4
    spec = SubmodelSpec.of(model.shape, widths, heads=heads, depth=depth, image_size=resolution)
    small = model.extract(spec)
    # A fused attention kernel would go uncounted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 3, resolution, resolution))
    assert model.flops(spec) == counter.get_total_flops()
    assert model.num_params(spec) == sum(parameter.numel() for parameter in small.parameters())


@given(data=st.data(), small=WIDTHS)
def test_wider_costs_more(data: st.DataObject, small: tuple[int, ...]) -> None:
    wide = data.draw(st.tuples(*(st.integers(width, 128) for width in small)))
    cost = [flops(CONFIG, SubmodelSpec.of(SHAPE, widths)) for widths in (small, wide)]
    assert cost[0] <= cost[1]
    assert (cost[0] == cost[1]) == (small == wide)


def test_every_axis_saves_operations() -> None:
    cost = [flops(CONFIG, SHAPE.spec(text)) for text in ("XL", "S", "S-h2", "S-h2-d2", "S-h2-d2-r16")]
    assert cost == sorted(cost, reverse=True)
    assert len(set(cost)) == 5


def test_vit_small_at_224_is_the_known_number() -> None:
    """ViT-S/14 at 224 px: 11.0 G by hand (257 tokens, 12 blocks of 384), S is 0.48 of it."""
    config = ViTConfig(image_size=224, patch_size=14, embed_dim=384, num_heads=6, ffn_widths=(1536,) * 12)
    shape = EncoderShape(ffn_widths=(1536,) * 12, num_heads=6, image_size=224)
    full = flops(config, shape.spec())
    assert full == 2 * (256 * 588 * 384 + 12 * (257 * 384 * 384 * 12 + 2 * 257 * 257 * 384))
    assert round(flops(config, shape.spec("S")) / full, 2) == 0.48
