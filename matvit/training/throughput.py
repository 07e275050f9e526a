"""How quickly a run trains, against what its device could do."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from lightning_fabric.utilities.throughput import get_available_flops

_PASSES = 3  # a training step computes the forward pass once, and twice as much on the way back


class Throughput:
    """Counts what this process does; pictures of a step count once, however many submodels see them."""

    def __init__(self, device: torch.device, *, precision: str) -> None:
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        self._peak = get_available_flops(device, dtype) if device.type == "cuda" else None
        self._start()

    def _start(self) -> None:
        self._began, self._pictures, self._flops = time.monotonic(), 0, 0

    def count(self, pictures: int, *, trained: Iterable[int], frozen: int) -> None:
        """A step over `pictures`; FLOPs of one picture's forward pass in each trained submodel, and in frozen ones."""
        self._pictures += pictures
        self._flops += pictures * (_PASSES * sum(trained) + frozen)

    def take(self) -> tuple[float, float | None]:
        """Pictures a second since the last call, and the share of the device's peak FLOPs (None: unknown)."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate, used = self._pictures / seconds, self._flops / seconds
        self._start()
        return rate, used / self._peak if self._peak else None
