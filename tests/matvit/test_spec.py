"""Specs as values: one canonical string per function, exact round trips, an order, one-sentence refusals."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from matvit import EncoderShape, Granularity, SpecError, SubmodelSpec

VIT_SMALL = EncoderShape(
    ffn_widths=(1536,) * 12,
    num_heads=6,
    image_size=112,
    head_axis=True,
    keep_order=(0, 11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6),
    image_size_step=14,
)
FFN_ONLY = EncoderShape(ffn_widths=(1536,) * 12, num_heads=6, image_size=112)


@st.composite
def shapes(draw: st.DrawFn) -> EncoderShape:
    blocks = draw(st.integers(1, 6))
    uniform = st.integers(1, 64).map(lambda width: (width,) * blocks)
    mixed = st.lists(st.integers(1, 64), min_size=blocks, max_size=blocks).map(tuple)
    order = draw(st.permutations(range(blocks)))
    return EncoderShape(
        ffn_widths=draw(uniform | mixed),
        num_heads=draw(st.integers(1, 12)),
        image_size=28 * draw(st.integers(1, 8)),
        head_axis=draw(st.booleans()),
        keep_order=tuple(order[: draw(st.integers(0, blocks))]),
        image_size_step=draw(st.sampled_from([0, 14])),
    )


@st.composite
def specs(draw: st.DrawFn, shape: EncoderShape | None = None) -> SubmodelSpec:
    shape = shape or draw(shapes())
    named = st.lists(st.sampled_from(Granularity), min_size=shape.num_blocks, max_size=shape.num_blocks).map(
        lambda names: [name.width_of(full) for name, full in zip(names, shape.ffn_widths, strict=True)]
    )
    free = st.tuples(*(st.integers(1, full) for full in shape.ffn_widths))
    return SubmodelSpec.of(
        shape,
        draw(named | free),
        heads=draw(st.integers(1, shape.num_heads)) if shape.head_axis else None,
        depth=draw(st.integers(1, len(shape.keep_order))) if shape.keep_order else None,
        image_size=draw(st.sampled_from([14, 28, 56])) if shape.image_size_step else None,
    )


@given(spec=specs())
def test_text_round_trips_and_is_safe_in_shells_and_file_names(spec: SubmodelSpec) -> None:
    text = str(spec)
    assert re.fullmatch(r"[A-Za-z0-9.-]+", text)
    assert spec.shape.spec(text) == spec
    assert spec.shape.spec(f" {text.lower()} ") == spec


@given(spec=specs())
def test_json_round_trips(spec: SubmodelSpec) -> None:
    raw = json.loads(json.dumps(spec.to_json()))
    assert SubmodelSpec.from_json(spec.shape, raw) == spec


def test_numpy_integers_become_plain_ones() -> None:
    sizes = np.array([3, 10, 84])
    spec = SubmodelSpec.of(VIT_SMALL, list(np.full(12, 768)), heads=sizes[0], depth=sizes[1], image_size=sizes[2])
    assert spec == VIT_SMALL.spec("L-h3-d10-r84")
    assert SubmodelSpec.from_json(VIT_SMALL, json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("sizes", [{"widths": [768.0] * 12}, {"heads": 3.0}, {"depth": "10"}])
def test_sizes_that_are_no_integers_are_type_errors(sizes: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        SubmodelSpec.of(VIT_SMALL, **{"widths": [768] * 12} | sizes)


@given(data=st.data(), shape=shapes())
def test_one_string_per_function(data: st.DataObject, shape: EncoderShape) -> None:
    """Widths of dropped blocks do not matter; everything else does."""
    one = data.draw(specs(shape))
    others = data.draw(st.tuples(*(st.integers(1, full) for full in shape.ffn_widths)))
    widths = [
        width if block in one.kept_blocks else other
        for block, (width, other) in enumerate(zip(one.widths, others, strict=True))
    ]
    same = SubmodelSpec.of(shape, widths, heads=one.heads, depth=one.depth, image_size=one.image_size)
    assert (same, str(same), hash(same)) == (one, str(one), hash(one))


@given(data=st.data(), shape=shapes())
def test_different_functions_have_different_strings(data: st.DataObject, shape: EncoderShape) -> None:
    one, other = data.draw(specs(shape)), data.draw(specs(shape))
    assume(one != other)
    assert str(one) != str(other)
    assert [w for b, w in enumerate(one.widths) if b in one.kept_blocks] != [
        w for b, w in enumerate(other.widths) if b in other.kept_blocks
    ] or (one.heads, one.depth, one.image_size) != (other.heads, other.depth, other.image_size)


@given(data=st.data(), shape=shapes())
def test_specs_are_ordered_and_hashable(data: st.DataObject, shape: EncoderShape) -> None:
    some = data.draw(st.lists(specs(shape), max_size=6))
    shuffled = data.draw(st.permutations(some))
    assert sorted(some) == sorted(shuffled)
    assert set(some) == {shape.spec(str(spec)) for spec in some}


@given(shape=shapes())
def test_granularities_rise_to_the_full_encoder(shape: EncoderShape) -> None:
    named = list(shape.granularities())
    assert named == sorted(named)
    assert named[-1] == shape.spec() == shape.spec("XL")
    assert named[-1].is_full
    assert str(named[-1]) == "XL"
    if min(shape.ffn_widths) >= 8:  # in narrower blocks some coincide
        assert [str(spec) for spec in named] == ["S", "M", "L", "XL"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("XL", "XL"),
        ("12S", "S"),
        ("6S.6XL", "6S.6XL"),
        ("3S.3S.6XL", "6S.6XL"),
        ("12w960", "12w960"),
        ("w960", "12w960"),
        ("w768", "L"),
        ("M-d10-r84", "M-d10-r84"),
        ("m-r84-D10", "M-d10-r84"),
        ("S-h3-d8-r56", "S-h3-d8-r56"),
        ("S-r448", "S-r448"),
        ("XL-h6-d12-r112", "XL"),
        ("5S.2M.5S-d10", "S-d10"),  # blocks 5 and 6 are the two that are dropped
        ("5S.7XL-d10", "7S.5XL-d10"),
    ],
)
def test_canonical_strings(text: str, canonical: str) -> None:
    assert str(VIT_SMALL.spec(text)) == canonical


def test_kept_blocks_run_in_their_original_order() -> None:
    assert VIT_SMALL.spec("S-d3").kept_blocks == (0, 1, 11)
    assert VIT_SMALL.spec("S").kept_blocks == tuple(range(12))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Q",
        "5S",
        "13S",
        "6S.7XL",
        "S.XL",
        "0S.12XL",
        "6S6XL",
        "w0",
        "w1537",
        "S-",
        "S-h0",
        "S-h7",
        "S-h3-h2",
        "S-x3",
    ],
)
def test_strings_that_name_no_submodel_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        VIT_SMALL.spec(text)
    assert "\n" not in str(caught.value)
    assert "use S, M, L, XL" in str(caught.value)


@given(shape=shapes())
def test_the_refusal_names_a_submodel_of_each_axis_that_the_encoder_has(shape: EncoderShape) -> None:
    with pytest.raises(SpecError) as caught:
        shape.spec("Q")
    named = [shape.spec(example) for example in re.findall(r"such as ([^,]+)", str(caught.value))]
    cut = {
        "ffn": any(spec.widths != shape.ffn_widths for spec in named) or max(shape.ffn_widths) == 1,
        "heads": any(spec.heads < shape.num_heads for spec in named) == (shape.head_axis and shape.num_heads > 1),
        "depth": any(spec.depth < shape.num_blocks for spec in named)
        == (bool(shape.keep_order) and shape.num_blocks > 1),
        "resolution": any(spec.image_size != shape.image_size for spec in named) == bool(shape.image_size_step),
    }
    assert all(cut.values()), (cut, str(caught.value))


@pytest.mark.parametrize("long", ["S-h9", "9S", "w9"])
def test_endless_numbers_are_refused(long: str) -> None:
    with pytest.raises(SpecError):
        VIT_SMALL.spec(long.replace("9", "9" * 5000))


@pytest.mark.parametrize("text", ["S-d0", "S-d13", "S-r0", "S-r50", "S-r462", "S-r999999994", "S/../..", "ſ", "S-h٣"])
def test_sizes_and_letters_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        VIT_SMALL.spec(text)


@given(text=st.text(max_size=20) | st.from_regex(r"[0-9SMLXWw.hdr-]{1,12}", fullmatch=True))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        spec = VIT_SMALL.spec(text)
    except SpecError:
        return
    assert VIT_SMALL.spec(str(spec)) == spec


@pytest.mark.parametrize("text", ["S-h3", "S-d10", "S-r84"])
def test_axes_that_the_encoder_lacks_are_refused(text: str) -> None:
    assert FFN_ONLY.axes == ("ffn",)
    assert VIT_SMALL.axes == ("ffn", "heads", "depth", "resolution")
    with pytest.raises(SpecError, match=r"such as 12w768, or runs of blocks such as 6S\.6XL$"):
        FFN_ONLY.spec(text)


@pytest.mark.parametrize("value", [5, True, b"S", ["S"]])
def test_what_is_no_text_is_a_spec_error(value: Any) -> None:
    with pytest.raises(SpecError, match="names no submodel; give a name"):
        VIT_SMALL.spec(value)


def test_a_spec_of_another_shape_is_refused() -> None:
    with pytest.raises(SpecError, match="another shape"):
        VIT_SMALL.spec(FFN_ONLY.spec("S"))


@pytest.mark.parametrize(
    "change",
    [
        {"ffn": [1536] * 11},
        {"ffn": [1536.0] * 12},
        {"ffn": [True] * 12},
        {"heads": True},
        {"heads": "6"},
        {"depth": None},
        {"resolution": 100},
        {"tokens": 4},  # an axis of a newer version
    ],
)
def test_malformed_json_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        SubmodelSpec.from_json(VIT_SMALL, VIT_SMALL.spec().to_json() | change)


@pytest.mark.parametrize("keep_order", [(0, 0), (2,), (-1,)])
def test_a_keep_order_must_name_blocks_once(keep_order: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="keep_order"):
        EncoderShape(ffn_widths=(8, 8), num_heads=1, image_size=32, keep_order=keep_order)
