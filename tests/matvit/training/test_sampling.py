"""Which submodels a step trains: pure, seeded, never shrinking with depth, never the full encoder."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from matvit.spec import EncoderShape
from matvit.training.sampling import specs_of_step

SHAPE = EncoderShape(ffn_widths=(64,) * 4, num_heads=2, image_size=32)


@given(seed=st.integers(-5, 2**31), step=st.integers(0, 10**6), sampled=st.integers(0, 5))
def test_sampled_specs_are_repeatable_and_never_shrink_with_depth(seed, step, sampled):
    specs = specs_of_step(SHAPE, fixed=("S",), sampled=sampled, seed=seed, step=step)
    assert specs == specs_of_step(SHAPE, fixed=("S",), sampled=sampled, seed=seed, step=step)
    assert str(specs[0]) == "S"
    assert len(specs) == 1 + sampled
    for spec in specs:
        assert list(spec.widths) == sorted(spec.widths)
        assert not spec.is_full


def test_steps_and_seeds_draw_differently():
    def drawn(seed: int) -> list[str]:
        return [str(specs_of_step(SHAPE, fixed=(), sampled=1, seed=seed, step=step)[0]) for step in range(60)]

    assert drawn(0) != drawn(1)
    assert {"M", "L"} < set(drawn(0))  # and mixed ones
