"""What this installation can do, and what it lacks: no printing, nothing imported that may be missing."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matvit.bundled import bundled_folders
from matvit.errors import MatVitError, MissingExtraError
from matvit.threads import usable_cores

# Optional packages by extra, as modules are imported. A test compares them with pyproject.toml.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch", "torchvision", "timm"),
    "parquet": ("pyarrow",),
    "fsspec": ("fsspec",),
    "app": ("streamlit", "altair", "vl_convert"),
    "train": ("lightning_fabric", "yaml"),
    "tensorboard": ("tensorboard",),
}
_DISTRIBUTIONS = ("matvit-retrieval", "torch", "torchvision", "timm", "faiss-gpu", "faiss-cpu", "numpy", "pillow")


def extra_of(module: str) -> str | None:
    """The extra that installs `module` ("torch.nn" counts as "torch"); None when no extra does."""
    package = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if package in modules), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraState:
    """One extra: which of its packages are missing, and the line that installs them."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """One bundled checkpoint, and what is wrong with it (None: nothing)."""

    name: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """All that `matvit doctor` found."""

    python: str
    platform: str
    versions: Mapping[str, str]  # of the distributions that are installed
    devices: tuple[str, ...]
    threads: Mapping[str, int]  # CPU threads: what there is, and what each library uses
    runtimes: tuple[str, ...]  # what can compute embeddings here
    checkpoints: tuple[CheckpointState, ...]
    extras: tuple[ExtraState, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps the product from working, one sentence each; missing extras alone are no problem."""
        found = [f"{state.name}: {state.problem}" for state in self.checkpoints if state.problem]
        if not self.checkpoints:
            found.append("no checkpoint is bundled; install the package again")
        if not self.runtimes:
            found.append(f"nothing can compute embeddings here; {_install_line('torch')}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The form that `matvit doctor --json` prints."""
        return {"ok": not self.problems, "problems": list(self.problems), **asdict(self)}


def run_doctor() -> DoctorReport:
    """Looks at everything; takes a few seconds where torch is installed."""
    extras = tuple(
        ExtraState(name=name, missing=tuple(m for m in modules if not _installed(m)), install=_install_line(name))
        for name, modules in EXTRAS.items()
    )
    has_torch = not extras[0].missing
    return DoctorReport(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=_versions(),
        devices=_devices() if has_torch else ("cpu",),
        threads=_threads(has_torch),
        runtimes=_runtimes() if has_torch else (),
        checkpoints=_checkpoints(has_torch),
        extras=extras,
    )


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _install_line(extra: str) -> str:
    return MissingExtraError.for_extra(extra, purpose="this").fix


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> tuple[str, ...]:
    import torch

    gpus = (f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count()))
    return ("cpu", *gpus)


def _runtimes() -> tuple[str, ...]:
    import torch

    return ("torch-cpu", "torch-cuda") if torch.cuda.is_available() else ("torch-cpu",)


def _threads(has_torch: bool) -> dict[str, int]:
    import faiss

    threads = {"cpus": usable_cores(), "faiss": int(faiss.omp_get_max_threads())}
    if has_torch:
        import torch

        threads["torch"] = torch.get_num_threads()
    return threads


def _checkpoints(has_torch: bool) -> tuple[CheckpointState, ...]:
    return tuple(
        CheckpointState(name=name, problem=_problem(folder, has_torch)) for name, folder in bundled_folders().items()
    )


def _problem(folder: Path, has_torch: bool) -> str | None:
    """Without torch the weights' hash is compared; with it the checkpoint is loaded, its space_id included."""
    try:
        if has_torch:
            from matvit import MatViT

            MatViT.from_pretrained(folder)
            return None
        weights = json.loads((folder / "config.json").read_bytes())["weights"]
        found = hashlib.sha256((folder / weights["file"]).read_bytes()).hexdigest()
    except MatVitError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({error})"
    return None if found == weights["sha256"] else "its weights are not the ones that config.json names"
