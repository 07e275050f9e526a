"""What one query costs to encode, per submodel: ratios measured side by side in one run.

    python benchmarks/query_cost.py [--rounds 30] [--json]

Peers and limits: the plain timm model of the full size that a user would call by hand, and the time
that the submodel's FLOPs would take at the speed of a large matrix product on the same threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch

from matvit import MatViT
from matvit.preprocess import FloatArray
from matvit.torch_encoder import TorchEncoder

SPECS = ("S", "M", "L", "XL", "6S.6XL", "XL-r168", "XL-r112", "XL-r98", "XL-r84", "XL-r70", "XL-r56")


def milliseconds(call: Callable[[], object]) -> float:
    """One call's wall time."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def peak_gflops(size: int = 1024, rounds: int = 20) -> float:
    """Median speed of a float32 matrix product of `size`, in 10^9 operations a second."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = [milliseconds(lambda: left @ right) for _ in range(rounds)]
    return 2 * size**3 / statistics.median(times) / 1e6


def encoding(encoder: TorchEncoder, pixels: FloatArray) -> Callable[[], object]:
    """A call that encodes one picture at the resolution of the encoder's spec."""
    size = encoder.spec.image_size
    own = np.ascontiguousarray(pixels[..., :size, :size])
    return lambda: encoder.encode(own)


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Interleaved medians of encoding one picture, after a warm-up, and their ratios to XL."""
    torch.set_num_threads(threads)
    model = MatViT.from_pretrained("matvit-small")
    native = model.shape.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, native, native), dtype=np.float32)
    calls = {spec: encoding(model.encoder(spec), pixels) for spec in SPECS}
    plain = timm.create_model("vit_small_patch14_dinov2", img_size=native, num_classes=0).eval()
    picture = torch.from_numpy(pixels)

    @torch.inference_mode()
    def by_hand() -> None:
        plain(picture)

    calls["timm, by hand"] = by_hand
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3 + rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    median = {name: statistics.median(values[3:]) for name, values in times.items()}
    peak = peak_gflops()
    rows = []
    for name in calls:
        flops = model.flops(name if name in SPECS else None)
        rows.append(
            {
                "encoder": name,
                "ms": median[name],
                "ratio": median[name] / median["XL"],
                "flops_ratio": flops / model.flops(),
                "gflops": flops / median[name] / 1e6,
                "share_of_peak": flops / median[name] / 1e6 / peak,
            }
        )
    return {"threads": threads, "rounds": rounds, "matmul_gflops": peak, "rows": rows}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.threads)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['threads']} threads, matrix product {result['matmul_gflops']:.0f} GFLOP/s")
    print("| encoder | ms | of XL | FLOPs of XL | GFLOP/s | of the matrix product |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(
            f"| {row['encoder']} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['flops_ratio']:.2f} "
            f"| {row['gflops']:.0f} | {row['share_of_peak']:.2f} |"
        )


if __name__ == "__main__":
    main()
