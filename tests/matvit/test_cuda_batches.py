"""Pixels of decoders embed on a GPU as preprocessed ones do, from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from matvit import MatViT
from matvit.cuda_batches import CudaBatches
from matvit.torch_encoder import TorchEncoder

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_are_normalised_bit_by_bit_as_on_this_host(tiny: MatViT, device: str) -> None:
    every_value = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
    encoder = tiny.to(device).encoder("S")
    batches = CudaBatches(encoder.module, preprocessing=encoder.preprocessing)
    there = batches.normalise(torch.from_numpy(every_value).to(device))
    np.testing.assert_array_equal(there.cpu().numpy(), encoder.preprocessing.normalise(every_value), strict=True)


@on_gpu
def test_batches_of_several_shapes_embed_as_the_encoder_does_from_any_thread(tiny: MatViT) -> None:
    encoder = tiny.cuda().encoder("S")
    batches = encoder.for_batches()
    assert isinstance(batches, CudaBatches)
    random = np.random.default_rng(0)
    sizes = [8, 8, 3, 8, 1, *[8] * 20, 3]
    pixels = [random.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8) for size in sizes]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(batches.encode, pixels))
    for batch, embeddings in zip(pixels, found, strict=True):
        expected = encoder.encode(encoder.preprocessing.normalise(batch))
        np.testing.assert_array_equal(embeddings, expected, strict=True)


@pytest.mark.parametrize("device", DEVICES)
def test_an_encoder_takes_pixels_of_decoders_only_on_a_gpu_and_in_no_way_of_its_own(tiny: MatViT, device: str) -> None:
    class Own(TorchEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            return super().encode(pixels)

    encoder = tiny.to(device).encoder("S")
    assert (encoder.for_batches() is None) == (device == "cpu")
    encoder.device = torch.device("cuda")
    assert encoder.for_batches() is not None
    encoder.__class__ = Own
    assert encoder.for_batches() is None
