"""Which submodels a step trains: a function of seed and step alone, the same in every stage."""

from __future__ import annotations

import random
from collections.abc import Sequence

from matvit.spec import EncoderShape, Granularity, SubmodelSpec

MIXED = "mixed"
PREFIXES = (64, 128, 256)  # Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022


def specs_of_step(
    shape: EncoderShape, *, fixed: Sequence[str], sampled: int, ladder: Sequence[str], seed: int, step: int
) -> tuple[SubmodelSpec, ...]:
    """The fixed specs, then `sampled` different entries of the ladder.

    A "mixed" entry becomes per-block widths that never shrink with depth. Sandwich rule: Yu and Huang,
    "Universally Slimmable Networks", ICCV 2019; non-decreasing Mix'n'Match: MatFormer, section 3.3.
    """
    rng = random.Random(f"{seed}:{step}")  # noqa: S311  # a seed, not a secret
    drawn = rng.sample(ladder, min(sampled, len(ladder)))
    return tuple(shape.spec(text) for text in fixed) + tuple(ladder_spec(shape, text, rng) for text in drawn)


def resolution_of_step(resolutions: Sequence[int], *, native: int, seed: int, step: int) -> int:
    """The full encoder's input size in this step, pixels."""
    if not resolutions:
        return native
    return random.Random(f"{seed}:{step}:resolution").choice(resolutions)  # noqa: S311


def prefix_of_step(embedding_dim: int, *, seed: int, step: int) -> int:
    """How many of the embedding's first numbers must serve alone in this step, too."""
    shorter = [length for length in PREFIXES if length < embedding_dim] or [embedding_dim]
    return random.Random(f"{seed}:{step}:prefix").choice(shorter)  # noqa: S311


def ladder_spec(shape: EncoderShape, text: str, rng: random.Random) -> SubmodelSpec:
    """The spec that a ladder entry stands for. Raises SpecError when it is none of this encoder."""
    first, dash, rest = text.partition("-")
    if first != MIXED:
        return shape.spec(text)
    sizes = sorted(rng.choices(list(Granularity), k=shape.num_blocks), key=list(Granularity).index)
    if set(sizes) == {Granularity.XL}:
        sizes[0] = Granularity.L
    return shape.spec(".".join(f"1{size}" for size in sizes) + dash + rest)
