"""The torch runtime: an extracted submodel behind the `ImageEncoder` protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from matvit.cuda_batches import CudaBatches
from matvit.encoder import BatchEncoder
from matvit.preprocess import FloatArray, ImageSource, Preprocessing
from matvit.spec import SubmodelSpec


class TorchEncoder:
    """One submodel with its preprocessing, on the device of its module. Implements `ImageEncoder`."""

    def __init__(
        self, module: nn.Module, *, spec: SubmodelSpec, space_id: str, embedding_dim: int, preprocessing: Preprocessing
    ) -> None:
        self.module = module.eval()
        self.spec = spec
        self.space_id = space_id
        self.embedding_dim = embedding_dim
        self.preprocessing = preprocessing
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @property
    def runtime(self) -> str:
        """ "torch-cpu" or "torch-cuda"."""
        return f"torch-{self.device.type}"

    def for_batches(self) -> BatchEncoder | None:
        """This encoder for many batches that others decode, if it is on a GPU; else None.

        None for a class that preprocesses or encodes in a way of its own, too.
        """
        own = any(getattr(type(self), name) is not getattr(TorchEncoder, name) for name in ("preprocess", "encode"))
        if own or self.device.type != "cuda":
            return None
        return CudaBatches(self.module, preprocessing=self.preprocessing)

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        """Pictures -> (N, 3, H, W) float32. Raises ImageError for the first unreadable one."""
        return self.preprocessing.batch(images, size=self.spec.image_size)

    @torch.inference_mode()
    def encode(self, pixels: FloatArray) -> FloatArray:
        """(N, 3, H, W) float32 -> (N, D) float32 of unit length."""
        batch = torch.from_numpy(pixels).to(self.device, dtype=self.dtype)
        embeddings: FloatArray = F.normalize(self.module(batch).float(), dim=-1).cpu().numpy()
        return embeddings

    def embed(self, images: Sequence[ImageSource]) -> FloatArray:
        """Pictures -> (N, D) float32 of unit length."""
        return self.encode(self.preprocess(images))
