"""Which submodels are trained at a step: pure, and a function of seed and step alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from matvit.spec import EncoderShape, Granularity, SubmodelSpec


def specs_of_step(
    shape: EncoderShape, *, fixed: Sequence[str], sampled: int, seed: int, step: int
) -> tuple[SubmodelSpec, ...]:
    """The fixed specs, then `sampled` random ones: M, L, or per-block widths that never shrink with depth.

    The full encoder is trained in every step and is not among them. Sandwich rule: Yu and Huang,
    "Universally Slimmable Networks", ICCV 2019; non-decreasing Mix'n'Match: MatFormer, section 3.3.
    """
    rng = random.Random(f"{seed}:{step}")  # noqa: S311  # a seed, not a secret
    drawn = [_draw(shape, rng) for _ in range(sampled)]
    return tuple(shape.spec(text) for text in fixed) + tuple(drawn)


def _draw(shape: EncoderShape, rng: random.Random) -> SubmodelSpec:
    kind = rng.choice(("M", "L", "mixed"))
    if kind != "mixed":
        return shape.spec(kind)
    sizes = sorted(rng.randrange(len(Granularity)) for _ in range(shape.num_blocks))
    names = [list(Granularity)[size] for size in sizes]
    mixed = SubmodelSpec.of(shape, [name.width_of(full) for name, full in zip(names, shape.ffn_widths, strict=True)])
    return shape.spec("L") if mixed.is_full else mixed
