"""Submodel specs: which slice of an elastic encoder is meant, as a value, a short string, or JSON.

Pure Python, no torch. The grammar (letters, digits, '-' and '.' only, so that a spec is safe in a
shell, a file name, a URL and a comma list):

    spec  = ffn ["-h" heads] ["-d" depth] ["-r" pixels]
    ffn   = width | run ("." run)*          runs cover the parent's blocks in order
    run   = count width
    width = "S" | "M" | "L" | "XL" | "w" hidden-units

Equal functions have equal strings: a width that has a name prints the name, a value that equals the
parent's is left out, and the widths of dropped blocks are normalised away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from operator import index

from matvit.errors import SpecError

MAX_ENLARGEMENT = 4  # largest resolution over the native one: 16 times the tokens, 256 times the attention products


class Granularity(StrEnum):
    """A named uniform submodel: this fraction of every block's own FFN hidden width.

    For the usual ratio of 4 these are 0.5, 1, 2 and 4 times the embedding width, the sizes of
    MatFormer (arXiv 2310.07707, section 3).
    """

    S = "S"
    M = "M"
    L = "L"
    XL = "XL"

    @property
    def divisor(self) -> int:
        """The full hidden width divided by this is the granularity's width."""
        return {"S": 8, "M": 4, "L": 2, "XL": 1}[self.value]

    def width_of(self, full_width: int) -> int:
        """Hidden units that this granularity keeps of an FFN of `full_width` hidden units."""
        return max(1, full_width // self.divisor)

    @classmethod
    def named(cls, width: int, full_width: int) -> Granularity | None:
        """The granularity of `width` of `full_width` units; the largest, as those of very narrow FFNs coincide."""
        return next((one for one in reversed(cls) if one.width_of(full_width) == width), None)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class EncoderShape:
    """What specs are cut from: the full encoder's sizes, and the axes that it can be cut along.

    FFN width is always an axis. The others are off until an encoder was trained for them:
    `head_axis` False, `keep_order` empty and `image_size_step` 0 mean "not cut along this axis".
    """

    ffn_widths: tuple[int, ...]  # full hidden width of each block
    num_heads: int
    image_size: int  # pixels, the native resolution
    head_axis: bool = False
    keep_order: tuple[int, ...] = ()  # block indices, the most important first
    image_size_step: int = 0  # pixels; other resolutions are multiples of it, up to MAX_ENLARGEMENT times the native

    def __post_init__(self) -> None:
        kept = self.keep_order
        if len(set(kept)) != len(kept) or not set(kept) <= set(range(self.num_blocks)):
            raise SpecError(
                what=f"keep_order {list(kept)} does not name different blocks of {self.num_blocks}",
                where="encoder shape",
                fix="list block indices from 0, each once",
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the full encoder."""
        return len(self.ffn_widths)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that this encoder can be cut along."""
        flags = {
            "ffn": True,
            "heads": self.head_axis,
            "depth": bool(self.keep_order),
            "resolution": self.image_size_step > 0,
        }
        return tuple(name for name, present in flags.items() if present)

    def spec(self, value: str | SubmodelSpec | None = None) -> SubmodelSpec:
        """The spec that `value` names: a granularity, a spec string, a spec, or None for the full encoder.

        Raises SpecError when `value` names no submodel of this encoder.
        """
        if value is None:
            return SubmodelSpec.of(self, self.ffn_widths)
        if isinstance(value, SubmodelSpec):
            if value.shape != self:
                raise SpecError(
                    what=f"spec '{value}' was made for an encoder of another shape",
                    where="encoder spec",
                    fix="pass its string, or parse it with this encoder's shape",
                )
            return value
        if not isinstance(value, str):
            raise SpecError(
                what=f"a {type(value).__name__} names no submodel", where="encoder spec", fix="give a name such as 'S'"
            )
        return _parse(value, self)

    def granularities(self) -> Iterator[SubmodelSpec]:
        """The uniform submodels S, M, L, XL, smallest first."""
        for granularity in Granularity:
            yield self.spec(granularity.value)


@dataclass(frozen=True, slots=True, order=True)
class SubmodelSpec:
    """One exact cut of one elastic encoder: immutable, hashable, ordered, with one canonical string.

    Make one with `EncoderShape.spec`, `SubmodelSpec.of` or `SubmodelSpec.from_json`.
    """

    widths: tuple[int, ...]  # FFN hidden units of each of the parent's blocks
    heads: int
    depth: int
    image_size: int  # pixels
    shape: EncoderShape

    @classmethod
    def of(
        cls,
        shape: EncoderShape,
        widths: Sequence[int],
        *,
        heads: int | None = None,
        depth: int | None = None,
        image_size: int | None = None,
    ) -> SubmodelSpec:
        """A checked, normalised spec; None keeps the full encoder's value.

        Raises SpecError for sizes that the encoder does not have.
        """
        widths = [int(index(width)) for width in widths]  # numpy's integers have no JSON form
        heads = int(index(shape.num_heads if heads is None else heads))
        depth = int(index(shape.num_blocks if depth is None else depth))
        image_size = int(index(shape.image_size if image_size is None else image_size))
        _check_sizes(shape, widths, heads=heads, depth=depth, image_size=image_size)
        kept = shape.keep_order[:depth] if depth < shape.num_blocks else range(shape.num_blocks)
        return cls(_without_dropped(shape, widths, frozenset(kept)), heads, depth, image_size, shape)

    @classmethod
    def from_json(cls, shape: EncoderShape, raw: Mapping[str, object]) -> SubmodelSpec:
        """The spec written by `to_json`. Raises SpecError when it is malformed or does not fit `shape`."""
        match raw:
            case {"ffn": [*widths], "heads": int(heads), "depth": int(depth), "resolution": int(pixels), **unknown}:
                numbers = [size for size in (*widths, heads, depth, pixels) if type(size) is int]  # true is no number
                if not unknown and len(numbers) == len(widths) + 3:  # a newer version's axis is not dropped silently
                    return cls.of(shape, numbers[:-3], heads=heads, depth=depth, image_size=pixels)
        raise _spec_error(f"{raw!r} is not a spec in JSON form", shape)

    def to_json(self) -> dict[str, object]:
        """The JSON form: absolute sizes for every axis."""
        return {
            "ffn": list(self.widths),
            "heads": self.heads,
            "depth": self.depth,
            "resolution": self.image_size,
        }

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Indices of the parent's blocks that run, in their original order."""
        if self.depth == self.shape.num_blocks:
            return tuple(range(self.depth))
        return tuple(sorted(self.shape.keep_order[: self.depth]))

    @property
    def is_full(self) -> bool:
        """True for the full encoder (XL on every axis)."""
        return self == self.shape.spec()

    def __str__(self) -> str:
        shape = self.shape
        text = _uniform_name(self.widths, shape.ffn_widths) or _runs(self.widths, shape.ffn_widths)
        if self.heads != shape.num_heads:
            text += f"-h{self.heads}"
        if self.depth != shape.num_blocks:
            text += f"-d{self.depth}"
        if self.image_size != shape.image_size:
            text += f"-r{self.image_size}"
        return text


# At most nine digits: int() refuses thousands of them with an error of its own.
_RUN = re.compile(r"([1-9]\d{0,8})?(S|M|L|XL|W\d{1,9})", re.IGNORECASE | re.ASCII)
_AXIS = re.compile(r"([HDR])(\d{1,9})", re.IGNORECASE | re.ASCII)


def _parse(text: str, shape: EncoderShape) -> SubmodelSpec:
    ffn, *axes = text.strip().split("-")
    sizes: dict[str, int] = {}
    for part in axes:
        match = _AXIS.fullmatch(part)
        if match is None or match[1].lower() in sizes:
            raise _spec_error(f"'{text}' is not a submodel spec: '{part}' is not one axis and its size", shape)
        sizes[match[1].lower()] = int(match[2])
    return SubmodelSpec.of(
        shape,
        _parse_widths(ffn, text, shape),
        heads=sizes.get("h"),
        depth=sizes.get("d"),
        image_size=sizes.get("r"),
    )


def _parse_widths(ffn: str, text: str, shape: EncoderShape) -> list[int]:
    runs = [_RUN.fullmatch(part) for part in ffn.split(".")]
    names: list[str] = []
    for match in runs:
        if match is None or (match[1] is None and len(runs) > 1):
            raise _spec_error(f"'{text}' is not a submodel spec", shape)
        count = shape.num_blocks if match[1] is None else int(match[1])
        if count > shape.num_blocks:  # refuse before building a huge list
            raise _spec_error(f"'{text}' covers more than the encoder's {shape.num_blocks} blocks", shape)
        names += [match[2].upper()] * count
    if len(names) != shape.num_blocks:
        raise _spec_error(f"'{text}' covers {len(names)} blocks of the encoder's {shape.num_blocks}", shape)
    return [
        int(name[1:]) if name.startswith("W") else Granularity(name).width_of(full)
        for name, full in zip(names, shape.ffn_widths, strict=True)
    ]


def _check_sizes(shape: EncoderShape, widths: Sequence[int], *, heads: int, depth: int, image_size: int) -> None:
    if len(widths) != shape.num_blocks:
        raise _spec_error(f"{len(widths)} widths were given for {shape.num_blocks} blocks", shape)
    for block, (width, full) in enumerate(zip(widths, shape.ffn_widths, strict=True)):
        if not 1 <= width <= full:
            raise _spec_error(f"block {block} has {full} hidden units, not {width}", shape)
    if heads != shape.num_heads and not (shape.head_axis and 1 <= heads < shape.num_heads):
        possible = f", but from 1 to {shape.num_heads}" if shape.head_axis else ": this encoder has no such axis"
        raise _spec_error(f"{heads} of {shape.num_heads} attention heads cannot be kept{possible}", shape)
    if depth != shape.num_blocks and not 1 <= depth <= len(shape.keep_order):
        possible = f", but from 1 to {len(shape.keep_order)}" if shape.keep_order else ": this encoder has no such axis"
        raise _spec_error(f"{depth} of {shape.num_blocks} blocks cannot be kept{possible}", shape)
    step, largest = shape.image_size_step, MAX_ENLARGEMENT * shape.image_size
    if image_size != shape.image_size and not (step and step <= image_size <= largest and image_size % step == 0):
        multiple = f", but multiples of {step} up to {largest} can" if step else ": this encoder has no such axis"
        raise _spec_error(f"pictures of {image_size} px cannot be encoded{multiple}", shape)


def _without_dropped(shape: EncoderShape, widths: Sequence[int], kept: frozenset[int]) -> tuple[int, ...]:
    """Dropped blocks take the width of the kept block before them (or the first kept one), by name if it has one."""
    source = min(kept)
    result: list[int] = []
    for block, full in enumerate(shape.ffn_widths):
        source = block if block in kept else source
        name = _width_name(widths[source], shape.ffn_widths[source])
        named = name in Granularity.__members__ and block not in kept
        # Blocks of a mixed-width parent differ in size: a number is taken over as far as it fits.
        result.append(Granularity(name).width_of(full) if named else min(widths[source], full))
    return tuple(result)


def _uniform_name(widths: Sequence[int], full_widths: Sequence[int]) -> str | None:
    """The granularity that all widths have; the largest, as those of very narrow blocks coincide."""
    for granularity in reversed(Granularity):
        if all(granularity.width_of(full) == width for width, full in zip(widths, full_widths, strict=True)):
            return granularity.value
    return None


def _width_name(width: int, full: int) -> str:
    return _uniform_name([width], [full]) or f"w{width}"


def _runs(widths: Sequence[int], full_widths: Sequence[int]) -> str:
    names = [_width_name(width, full) for width, full in zip(widths, full_widths, strict=True)]
    return ".".join(f"{len(list(group))}{name}" for name, group in groupby(names))


def _spec_error(what: str, shape: EncoderShape) -> SpecError:
    *examples, last = (f"{meant} such as {example}" for meant, example in _examples(shape))
    return SpecError(what=what, where="encoder spec", fix=f"use {', '.join(['S, M, L, XL', *examples])}, or {last}")


def _examples(shape: EncoderShape) -> Iterator[tuple[str, str]]:
    """What each axis of the encoder offers, in words and as a spec."""
    blocks, half = shape.num_blocks, shape.num_blocks // 2
    yield f"a width for all {blocks} blocks", f"{blocks}w{max(1, min(shape.ffn_widths) // 2)}"
    if half:
        yield "runs of blocks", f"{half}S.{blocks - half}XL"
    if shape.head_axis and shape.num_heads > 1:
        yield "fewer heads", f"XL-h{shape.num_heads // 2}"
    if shape.keep_order and blocks > 1:
        yield "fewer blocks", f"M-d{min(len(shape.keep_order), max(1, blocks - 2))}"
    if step := shape.image_size_step:
        smaller = step * max(1, shape.image_size // step // 2)
        yield "other pictures", f"XL-r{smaller if smaller != shape.image_size else 2 * step}"
