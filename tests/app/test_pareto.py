"""Which encoders the page offers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from matvit import MatViT
from matvit.model import AxesConfig
from matvit.pareto import EncoderChoice, pareto_front
from matvit_app.pareto import bargain, encoder_choices


def choice(flops: float, recall: float | None, spec: str = "S") -> EncoderChoice:
    return EncoderChoice(spec=spec, relative_flops=flops, recall=recall)


def beats(a: EncoderChoice, b: EncoderChoice) -> bool:
    """At least as good at no more FLOPs, and better in one of them."""
    pair = (a.relative_flops, -a.recall), (b.relative_flops, -b.recall)
    return pair[0] != pair[1] and all(mine <= other for mine, other in zip(*pair, strict=True))


few = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # few values, so that ties are common


@given(st.lists(st.builds(choice, few, st.none() | few), max_size=8))
def test_the_front_is_what_nothing_beats(choices):
    front = pareto_front(choices)
    measured = [one for one in choices if one.recall is not None]
    assert front == sorted(front, key=lambda one: one.relative_flops)
    assert len(set(front)) == len(front)
    assert set(front) == {one for one in measured if not any(beats(other, one) for other in measured)}


def test_of_equals_the_first_is_kept():
    assert [one.spec for one in pareto_front([choice(0.5, 0.9, "M"), choice(0.5, 0.9, "L")])] == ["M"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=56, patch_size=14, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    model = MatViT.from_timm(vit)
    model.open_axes(AxesConfig(keep_order=(0, 3, 1, 2), image_size_step=14))
    return model


def rows(**recall: float):
    return tuple(
        {"spec": spec.replace("_", "-"), "relative_flops": 1.0, "quality": {"recall@1": value}}
        for spec, value in recall.items()
    )


def test_without_a_measured_table_the_four_names_are_offered(model):
    model.pareto = ({"spec": "XL-r42", "quality": {}}, {"spec": "XL-r28"})
    offered = encoder_choices(model)
    assert [one.spec for one in offered] == ["S", "M", "L", "XL"]
    assert {one.recall for one in offered} == {None}
    assert offered[-1].relative_flops == 1


def test_the_four_names_are_followed_by_the_rows_that_nothing_beats(model):
    # S-d3 costs more than XL-r28 and finds less.
    model.pareto = rows(S=0.5, M=0.6, L=0.7, XL=0.8, XL_r28=0.75, S_d3=0.4, XL_r42=0.81)
    offered = encoder_choices(model)
    assert [one.spec for one in offered] == ["S", "M", "L", "XL", "XL-r42", "XL-r28"]
    assert [one.recall for one in offered] == [0.5, 0.6, 0.7, 0.8, 0.81, 0.75]
    assert all(one.relative_flops == model.flops(one.spec) / model.flops() for one in offered)


@pytest.mark.parametrize("row", [{"XL_r28": math.nan}, {"XL_r28": 93.0}])
def test_a_row_that_is_no_share_is_not_offered(model, row):
    model.pareto = rows(**row)
    assert [one.spec for one in encoder_choices(model)] == ["S", "M", "L", "XL"]


def test_one_submodel_by_two_names_is_offered_once(model):
    model.pareto = rows(XL_d4=0.8, XL=0.8, **{"4S": 0.5})
    assert [(one.spec, one.recall) for one in encoder_choices(model)] == [
        ("S", 0.5),
        ("M", None),
        ("L", None),
        ("XL", 0.8),
    ]


@given(st.lists(st.builds(choice, few, st.none() | few), min_size=1, max_size=8))
def test_the_bargain_is_the_cheapest_that_loses_at_most_a_point(choices):
    found = choices[bargain(choices)]
    recalls = [one.recall for one in choices if one.recall]
    if not recalls:
        assert found is choices[0]
        return
    assert found.recall >= max(recalls) - 0.01
    assert not any(
        one.recall and one.recall >= found.recall and one.relative_flops < found.relative_flops for one in choices
    )
