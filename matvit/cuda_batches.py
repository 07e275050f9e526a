"""Many batches through a module on a GPU, which is to have the next one before it is done with the last."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matvit.preprocess import FloatArray, PixelArray, Preprocessing


class CudaBatches:
    """`module` with its preprocessing, on its GPU. Implements `BatchEncoder`. Safe from any thread.

    A thread that calls `encode` sleeps while the device computes; another one may call it meanwhile.
    """

    def __init__(self, module: nn.Module, *, preprocessing: Preprocessing) -> None:
        parameter = next(module.parameters())
        self._module, self._device, self._dtype = module, parameter.device, parameter.dtype
        self.preprocessing = preprocessing
        self._white, self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._device).reshape(-1, 1, 1)
            for values in ((255.0,), preprocessing.mean, preprocessing.std)
        )
        self._lock = threading.Lock()

    @torch.inference_mode()
    def encode(self, pixels: PixelArray) -> FloatArray:
        """(N, 3, H, W) uint8, as `Preprocessing.pixels` gives them -> (N, D) float32 of unit length."""
        batch = torch.from_numpy(pixels).pin_memory()  # from other memory, this thread would wait for what is computed
        with torch.cuda.device(self._device):
            with self._lock:  # this batch's embeddings are to leave the device before the next batch is computed
                features = self._module(self.normalise(batch.to(self._device, non_blocking=True)).to(self._dtype))
                embeddings = F.normalize(features.float(), dim=-1)
                found = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
                found.copy_(embeddings, non_blocking=True)
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record()
            done.synchronize()
        copied: FloatArray = found.numpy().copy()
        return copied

    def normalise(self, pixels: Tensor) -> Tensor:
        """`Preprocessing.normalise` on the device, bit by bit: CUDA would multiply by the inverse of a plain number."""
        return (pixels.float() / self._white - self._mean) / self._std
