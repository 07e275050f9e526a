"""Where the time of a training step goes: pictures a second, MFU, and the device's time by kind of kernel.

    python benchmarks/training_step.py [--recipe matvit-small] [--stage nested] [--steps 6] [--json]      # on a GPU

On generated pictures and random weights, so that it needs no data; the recipe's teacher, asked once before training,
is left out. Beside the physical limit: MFU is the share of the device's peak in matrix products.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from matvit.datasets import LabelledImages
from matvit.progress import silent
from matvit.training import loop
from matvit.training.processes import start_fabric
from matvit.training.recipe import Recipe, Stage, load_recipe
from matvit.training.state import LOG
from matvit.training.steps import optimise

KINDS = {  # of kernels, by parts of their names; the first that fits
    "attention": ("attention", "flash", "fmha", "sdpa", "cudnn::fusion", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "convolution": ("convolve", "conv", "nchw", "nhwc"),
    "crops": ("grid_sampler", "avg_pool", "upsample", "interpolate"),
    "optimiser": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset"),
}
REST = "norms, activations and other passes over memory"


def generated(name: str, *, pixels: int, count: int = 64) -> LabelledImages:
    """Pictures of noise in eight classes."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    return LabelledImages(
        name=name,
        images=pictures,
        labels=np.arange(count) % 8,
        class_names=tuple(map(str, range(8))),
        origins=[f"{name}/{row}" for row in range(count)],
    )


def without_teacher(recipe: Recipe, steps: int) -> Recipe:
    """The recipe on random weights, its stages `steps` long, their teacher's losses replaced by labels."""
    raw = recipe.model_dump(mode="json") | {"teacher": None, "validation": None}
    raw["encoder"]["weights"] = None
    for stage in raw["stages"]:
        stage["steps"] = steps
        for losses in (stage["full"], stage["submodels"]):
            if losses and (losses["teacher_classes"] or losses["teacher_features"]):
                losses |= {"teacher_classes": 0.0, "teacher_features": 0.0, "classification": 1.0}
    return Recipe.model_validate(raw)


def kernels(events: Iterable[Any]) -> dict[str, float]:
    """Milliseconds on the device by kind of kernel, of what the profiler recorded."""
    totals = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        if event.device_type() != DeviceType.CUDA or event.is_user_annotation():
            continue
        name = event.name().lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)
        totals[kind] += event.duration_ns() / 1e6
    return totals


def measure(recipe: Recipe, name: str, *, steps: int) -> dict[str, Any]:
    """One stage, once it is prepared: its first `steps` compile and warm up, as many are measured, as many profiled."""
    recipe = without_teacher(recipe, steps)
    number = next(index for index, stage in enumerate(recipe.stages) if stage.name == name)
    labelled = [generated(one.path, pixels=one.resolution) for one in recipe.data]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        fabric = start_fabric(recipe)
        opened.enter_context(loop.many_graphs(recipe, fabric))
        run = loop.prepare(recipe, fabric, labelled, Path(folder), silent)
        stage: Stage = recipe.stages[number]
        run.stage = number
        optimiser, schedule = loop.enter_stage(run, stage)

        def once() -> Mapping[str, Any]:
            run.step = 0
            optimise(run, stage, optimiser, schedule)
            row: dict[str, Any] = json.loads((Path(folder) / LOG).read_text().splitlines()[-1])
            return row

        once()
        row = once()
        on_gpu = run.fabric.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            once()
        # As recorded: the profiler's own table takes minutes to make of the many small kernels of frozen stages.
        spent = kernels(profiled.profiler.kineto_results.events()) if on_gpu else {}
    total = sum(spent.values()) or 1.0
    return {
        "stage": name,
        "pictures_per_second": row["images_per_second"],
        "mfu": row["mfu"],
        "device_time": {kind: round(time / total, 3) for kind, time in spent.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="matvit-small")
    parser.add_argument("--stage", default="full")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(load_recipe(arguments.recipe), arguments.stage, steps=arguments.steps)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.0%}"
    print(f"stage {found['stage']}: {found['pictures_per_second']:.0f} pictures a second{mfu}")
    for kind, share in sorted(found["device_time"].items(), key=lambda pair: -pair[1]):
        print(f"  {share:6.1%} {kind}")


if __name__ == "__main__":
    main()
