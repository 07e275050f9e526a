"""The torch runtime: an extracted submodel behind the `ImageEncoder` protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matvit.preprocess import FloatArray, ImageSource, PixelArray, Preprocessing
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
        self._white, self._mean, self._std = (  # copied there once: each copy would wait for what the device computes
            torch.tensor(values, dtype=torch.float32, device=self.device).reshape(-1, 1, 1)
            for values in ((255.0,), preprocessing.mean, preprocessing.std)
        )

    @property
    def runtime(self) -> str:
        """ "torch-cpu" or "torch-cuda"."""
        return f"torch-{self.device.type}"

    @property
    def decodes_apart(self) -> Preprocessing | None:
        """What `preprocess` does, if `encode` takes none of this host's cores: others decode faster, then.

        `encode` takes what they give, `Preprocessing.pixels`, as well.
        """
        own = type(self).preprocess is not TorchEncoder.preprocess
        return None if own or self.device.type == "cpu" else self.preprocessing

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        """Pictures -> (N, 3, H, W) float32. Raises ImageError for the first unreadable one."""
        return self.preprocessing.batch(images, size=self.spec.image_size)

    @torch.inference_mode()
    def encode(self, pixels: FloatArray | PixelArray) -> FloatArray:
        """(N, 3, H, W) float32, or uint8 before it was normalised -> (N, D) float32 of unit length."""
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":  # from other memory, the copy would wait for the batch that is computed
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        if batch.dtype == torch.uint8:
            batch = self.normalise(batch)
        embeddings: FloatArray = F.normalize(self.module(batch.to(self.dtype)).float(), dim=-1).cpu().numpy()
        return embeddings

    def normalise(self, pixels: Tensor) -> Tensor:
        """`Preprocessing.normalise` on the device, bit by bit: CUDA would multiply by the inverse of a plain number."""
        return (pixels.float() / self._white - self._mean) / self._std

    def embed(self, images: Sequence[ImageSource]) -> FloatArray:
        """Pictures -> (N, D) float32 of unit length."""
        return self.encode(self.preprocess(images))
