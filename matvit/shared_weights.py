"""Many submodels of one encoder at once, computed with its own weights: hundreds take the memory of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from matvit.model import MatViT
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.torch_encoder import TorchEncoder


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """`model`, whose submodels are not copied out of it. Implements `matvit.evaluation.Submodels`."""

    model: MatViT

    @property
    def shape(self) -> EncoderShape:
        """The full encoder's sizes and axes; parses specs."""
        return self.model.shape

    @cached_property
    def space_id(self) -> str:
        """Identity of the embedding space; computed once, so the weights must stay as they are."""
        return self.model.space_id

    def encoder(self, spec: str | SubmodelSpec | None = None) -> TorchEncoder:
        """The submodel `spec`: computes what `model.encoder(spec)` computes, from the same tensors as the others."""
        spec = self.model.shape.spec(spec)
        return TorchEncoder(
            _Nested(self.model, spec),
            spec=spec,
            space_id=self.space_id,
            embedding_dim=self.model.embedding_dim,
            preprocessing=self.model.preprocessing,
        )


class _Nested(nn.Module):
    def __init__(self, model: MatViT, spec: SubmodelSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.features(images, self.spec)
        return features
