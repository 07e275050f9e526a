"""What a granularity owns besides its slice: a delta to each tensor of its blocks, merged before it computes.

Matrices have deltas of low rank (Hu et al., "LoRA", arXiv 2106.09685), vectors (biases, norms, layer scales)
full ones, and two matrices of the last block may have full ones as well; all are zero at first. XL owns none: it,
and so every index that it made, stays as it is.

Letters in shape comments: R rank, n and m a tensor's sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from matvit import feed_forward
from matvit.backbone import TimmBlock, TimmViT
from matvit.spec import EncoderShape, Granularity, SubmodelSpec

LAST = ("attn.proj.weight", "mlp.fc2.weight")  # what leads into the last tokens: see matvit.adapting
OWNERS = (Granularity.S, Granularity.M, Granularity.L)


class PrivateConfig(BaseModel):
    """How much S, M and L own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int | None = Field(ge=1, le=2**10)  # of a matrix's delta; None: only the last block owns anything
    last: bool = False  # the last block's attention output and second feed-forward matrix have full deltas, too

    @model_validator(mode="after")
    def _something(self) -> PrivateConfig:
        if self.rank is None and not self.last:
            raise ValueError("without a rank, `last` must be true")
        return self


class PrivateBlock(nn.Module):
    """The deltas of one block at one granularity.

    `up.T @ down` to each matrix (n, m), `vector` to each vector (n,), and `full` to those matrices that have one.
    """

    def __init__(self, block: TimmBlock, *, width: int, config: PrivateConfig, last: bool) -> None:
        super().__init__()
        self.width = width
        self.owns = last or config.rank is not None
        # Vectors as rows, and `up` lying: int8 storage keeps one scale a row. Module names may not hold dots.
        self.down, self.up, self.vector = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.full = nn.ParameterDict()
        for name, tensor in _sliced(block, width).items() if self.owns else ():
            key = _key(name)
            if tensor.ndim == 1:
                self.vector[key] = nn.Parameter(tensor.new_zeros(1, len(tensor)))
                continue
            if last and config.last and name in LAST:
                self.full[key] = nn.Parameter(torch.zeros_like(tensor))
            if config.rank is not None:
                rows, columns = tensor.shape
                random = torch.randn(config.rank, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
                self.down[key] = nn.Parameter(random.to(tensor))  # (R, m)
                self.up[key] = nn.Parameter(tensor.new_zeros(config.rank, rows))  # (R, n)

    def merged(self, block: TimmBlock) -> TimmBlock:
        """`block` cut to this granularity's hidden units, with its deltas added; gradients reach both."""
        return _with_tensors(
            block, {name: self._changed(name, old) for name, old in _sliced(block, self.width).items()}
        )

    @torch.no_grad()
    def set_matrix(self, name: str, *, up: Tensor, down: Tensor) -> None:
        """The delta of the block's matrix `name` becomes `up.T @ down`, (r, n) and (r, m), of this rank or less."""
        key = _key(name)
        self.up[key].zero_()[: len(up)] = up.to(self.up[key])
        self.down[key][: len(down)] = down.to(self.down[key])

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        key = _key(name)
        if tensor.ndim == 1:
            changed: Tensor = tensor + self.vector[key][0]
            return changed
        if key in self.up:
            tensor = tensor + self.up[key].T @ self.down[key]
        return tensor + self.full[key] if key in self.full else tensor

    @torch.no_grad()
    def add(self, name: str, delta: Tensor) -> None:
        """Adds to the full delta (n, m) of a matrix that has one, or to that of a vector (n,)."""
        kind = self.vector if delta.ndim == 1 else self.full
        kind[_key(name)].add_(delta)


class PrivateParameters(nn.Module):
    """The private blocks of S, M and L; of the last block alone where there is no rank."""

    def __init__(self, vit: TimmViT, config: PrivateConfig) -> None:
        super().__init__()
        self.config = config
        last = len(vit.blocks) - 1
        self.blocks = nn.ModuleDict(
            {
                owner.value: nn.ModuleList(
                    PrivateBlock(
                        block, width=owner.width_of(block.mlp.fc2.in_features), config=config, last=index == last
                    )
                    for index, block in enumerate(vit.blocks)
                )
                for owner in OWNERS
            }
        )

    def of(self, index: int, *, width: int, full_width: int) -> PrivateBlock | None:
        """What the granularity of `width` owns in block `index`; None for XL's width and for one without a name."""
        owner = Granularity.named(width, full_width)
        if owner not in OWNERS:
            return None
        found = self.block(owner, index)
        return found if found.owns else None

    def block(self, owner: Granularity, index: int) -> PrivateBlock:
        """What S, M or L has of block `index`; it may own nothing."""
        found: PrivateBlock = self.blocks[owner.value][index]  # type: ignore[index]  # a ModuleList
        return found


def owns_something(shape: EncoderShape, spec: SubmodelSpec) -> bool:
    """Whether any block of `spec` has the width of S, M or L."""
    return any(Granularity.named(spec.widths[one], shape.ffn_widths[one]) in OWNERS for one in spec.kept_blocks)


def _key(name: str) -> str:
    """A parameter's name without dots; it ends in "weight", which int8 storage goes by."""
    return f"{name.replace('.', '-')}-weight"


def _sliced(block: TimmBlock, width: int) -> dict[str, Tensor]:
    """The block's tensors by name, the feed-forward's cut to its first `width` hidden units."""
    tensors: dict[str, Tensor] = dict(block.named_parameters())
    cut = feed_forward.sliced_parameters(block.mlp, width)
    return tensors | {f"mlp.{name}": tensor for name, tensor in cut.items()}


def _with_tensors(block: TimmBlock, tensors: Mapping[str, Tensor]) -> TimmBlock:
    """A block of the same kind that computes with `tensors`: parameters of its own where they are part of no graph."""

    def rebuilt(module: nn.Module, prefix: str) -> nn.Module:
        shallow = copy.copy(module)
        shallow._parameters, shallow._modules = dict(module._parameters), dict(module._modules)
        for name, child in module._modules.items():
            shallow._modules[name] = None if child is None else rebuilt(child, f"{prefix}{name}.")
        if isinstance(shallow, nn.Linear):
            shallow.out_features, shallow.in_features = tensors[f"{prefix}weight"].shape
        for name, old in module._parameters.items():
            if old is not None:
                new = tensors[prefix + name]
                # As torch.func.functional_call does: a tensor in a parameter's place.
                shallow._parameters[name] = (
                    nn.Parameter(new, requires_grad=old.requires_grad) if new.grad_fn is None else new  # type: ignore[assignment]
                )
        return shallow

    return rebuilt(block, "")
