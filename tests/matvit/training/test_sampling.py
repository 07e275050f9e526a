"""Which submodels a step trains: pure, seeded, never shrinking with depth, never the full encoder."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matvit.errors import SpecError
from matvit.spec import EncoderShape
from matvit.training.sampling import ladder_spec, resolution_of_step, specs_of_step

SHAPE = EncoderShape(ffn_widths=(64,) * 4, num_heads=2, image_size=32, keep_order=(0, 2, 1, 3), image_size_step=8)
LADDER = ("M", "L", "mixed", "S-r16", "mixed-d3-r16")


@given(seed=st.integers(-5, 2**31), step=st.integers(0, 10**6), sampled=st.integers(0, 7))
def test_sampled_specs_are_repeatable_and_never_shrink_with_depth(seed, step, sampled):
    specs = specs_of_step(SHAPE, fixed=("S",), sampled=sampled, ladder=LADDER, seed=seed, step=step)
    assert specs == specs_of_step(SHAPE, fixed=("S",), sampled=sampled, ladder=LADDER, seed=seed, step=step)
    assert str(specs[0]) == "S"
    assert len(specs) == 1 + min(sampled, len(LADDER))
    for spec in specs:
        assert list(spec.widths) == sorted(spec.widths)
        assert not spec.is_full


def test_every_entry_of_the_ladder_is_drawn_and_seeds_draw_differently():
    def drawn(seed: int) -> list[str]:
        steps = [specs_of_step(SHAPE, fixed=(), sampled=1, ladder=LADDER, seed=seed, step=step) for step in range(80)]
        return [str(specs[0]) for specs in steps]

    assert drawn(0) != drawn(1)
    assert {"M", "L", "S-r16"} < set(drawn(0))
    assert any(name.endswith("-d3-r16") for name in drawn(0))


def test_mixed_widths_differ_from_draw_to_draw_and_keep_the_other_axes():
    rng = random.Random(0)
    specs = {ladder_spec(SHAPE, "mixed-d3-r16", rng) for _ in range(20)}
    assert len(specs) > 5
    assert {(spec.depth, spec.image_size) for spec in specs} == {(3, 16)}


def test_an_entry_that_is_no_submodel_is_refused():
    for text in ("mixed-d9", "XXL", "S-r17"):
        with pytest.raises(SpecError):
            ladder_spec(SHAPE, text, random.Random(0))


def test_the_full_encoder_sees_each_resolution_in_turn_of_chance():
    drawn = [resolution_of_step((16, 32), native=32, seed=0, step=step) for step in range(40)]
    assert set(drawn) == {16, 32}
    assert drawn == [resolution_of_step((16, 32), native=32, seed=0, step=step) for step in range(40)]
    assert resolution_of_step((), native=32, seed=0, step=1) == 32
