"""What a trained checkpoint says of itself: where it came from, and what it was measured to do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from matvit.block import run_block
from matvit.checkpoint import Storage, locate, pareto_row, read_config
from matvit.datasets import LabelledImages, find_dataset, portable, read_dataset
from matvit.errors import MatVitError
from matvit.evaluation import cross_test
from matvit.model import MatViT
from matvit.progress import Progress
from matvit.training.recipe import Recipe, ValidationRecipe
from matvit.training.sampling import MIXED
from matvit.training.state import ENCODER, Run

Validation = tuple[LabelledImages, LabelledImages | None]  # queries and gallery; None: leave-one-out
_INHERITED = ("license", "credits", "notes")


def finish(run: Run, validation: Validation | None) -> MatViT:
    """Save the encoder beside the run with its record and Pareto table; returns it as loaded again from there.

    Measured is what was saved: with int8 storage, the de-quantised weights.
    """
    model, recipe, folder = run.model, run.recipe, run.folder / ENCODER
    model.block_forward, model.pareto = run_block, ()  # its table is that of the encoder that it went on from
    storage = _storage(recipe)
    before = None if recipe.encoder.checkpoint is None else _parent(model)
    model.record = _record(run, before=before)
    model.save_pretrained(folder, storage=storage)
    saved = MatViT.from_pretrained(folder).to(model.device)
    names = _names(saved, recipe)
    quality: dict[str, dict[str, float]] = {}
    if validation is not None:
        quality = _validate(saved, names, validation, run.progress)
        saved.record["metrics"] = {"validation": quality}
        if storage == "int8":  # else these are the weights that were trained
            saved.record["metrics"]["before_storage"] = _validate(model, names, validation, run.progress)
    saved.pareto = tuple(pareto_row(saved, name, quality.get(name, {})) for name in names)
    saved.save_pretrained(folder, storage=storage)
    return saved


def finished_before(run: Run) -> MatViT | None:
    """The encoder beside a complete run, as it lies there: it may have been adapted, or measured on more, since.

    None where it is missing, damaged or another run's, where a kill left it unmeasured, or where what the recipe says
    of it was corrected.
    """
    try:
        saved = MatViT.from_pretrained(run.folder / ENCODER).to(run.model.device)
    except MatVitError:
        return None
    before = None if run.recipe.encoder.checkpoint is None else _parent(run.model)
    told = json.loads(json.dumps(_record(run, before=before)))
    same = all(saved.record.get(name) == value for name, value in told.items())  # adapting and measuring add to it
    return saved if same and saved.pareto else None


def _storage(recipe: Recipe) -> Storage:
    """Rounded to int8, a float32 encoder has another space, though nothing was trained."""
    if recipe.storage is not None:
        return recipe.storage
    start = recipe.encoder.checkpoint
    return "int8" if start is None else read_config(locate(start)).weights.storage


def read_validation(recipe: ValidationRecipe) -> Validation:
    """What a run will be measured on, hours later. Raises DatasetError when it is not there."""
    queries, gallery = (
        None if location is None else read_dataset(find_dataset(location), classes=recipe.classes)
        for location in (recipe.queries, recipe.gallery)
    )
    assert queries is not None
    return queries, gallery


def _names(model: MatViT, recipe: Recipe) -> list[str]:
    """The granularities, then what else the recipe names of submodels, dearest first."""
    shape = model.shape
    named = {shape.spec(text) for stage in recipe.stages for text in (*stage.fixed, *stage.ladder) if MIXED not in text}
    named |= {shape.spec(f"XL-r{pixels}") for stage in recipe.stages for pixels in stage.resolutions}
    granularities = list(shape.granularities())
    others = sorted(named - set(granularities), key=model.flops, reverse=True)
    return [str(spec) for spec in (*granularities, *others)]


def _validate(
    model: MatViT, names: Sequence[str], validation: Validation, progress: Progress
) -> dict[str, dict[str, float]]:
    result = cross_test(model, *validation, query_specs=names, gallery_specs=["XL"], progress=progress)
    kept = ("recall@1", "recall@10", "map@100", "agreement@10")
    matrix = result.to_json()["matrix"]
    return {name: {key: round(matrix[name]["XL"][key], 4) for key in kept} for name in names}


def provenance(device: torch.device) -> dict[str, Any]:
    """What may change from one process of a run to the next that continues it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in ("matvit-retrieval", "torch", "timm", "lightning-fabric")},
        "commit": _commit(),
    }


def _record(run: Run, *, before: dict[str, Any] | None) -> dict[str, Any]:
    recipe, inherited = run.recipe, before or {}
    *earlier, last = run.made_by
    return {
        "recipe": _portable(recipe.model_dump(mode="json")),
        "seed": recipe.seed,
        "data": [
            {
                "path": portable(one.path),
                "classes": one.classes,
                "pictures": len(images),
                "class_names": list(images.class_names),
                "sha256": sha256,
                "skipped": [{"picture": _below_data(bad.path, one.path), "reason": bad.reason} for bad in unreadable],
            }
            for images, sha256, unreadable, one in zip(run.labelled, run.data, run.skipped, recipe.data, strict=True)
        ],
        "pictures_seen": sum(stage.steps * sum(recipe.batches_of(stage)) for stage in recipe.stages),
        "seconds": round(run.seconds, 1),
        "finished": run.finished,
        **last,
        **({"earlier": earlier} if earlier else {}),
        # `_INHERITED`, where the recipe names none
        "license": recipe.license or inherited.get("license"),
        "credits": list(recipe.credits) or inherited.get("credits", []),
        "notes": list(recipe.notes) or inherited.get("notes", []),
        **({} if before is None else {"before": {name: before[name] for name in before if name not in _INHERITED}}),
    }


def _parent(checkpoint: MatViT) -> dict[str, Any]:
    """The record of the checkpoint that a run went on from, and which weights those were; its figures are not ours."""
    kept = {name: value for name, value in checkpoint.record.items() if name != "metrics"}
    if isinstance(kept.get("data"), list):  # which classes these were, its sha256 tells as well
        kept["data"] = [{name: value for name, value in one.items() if name != "class_names"} for one in kept["data"]]
    return {**kept, "weights_sha256": checkpoint.weights_sha256}


def _portable(value: Any) -> Any:
    """`value` with every path in it portable."""
    match value:
        case dict():
            return {key: _portable(item) for key, item in value.items()}
        case list():
            return [_portable(item) for item in value]
        case str():
            return portable(value)
    return value


def _below_data(origin: str, location: str) -> str:
    """A picture's origin without the folder that its data set was found in, or that its shards lie in."""
    place = Path(find_dataset(location))
    folders = (f"{folder}{os.sep}" for folder in (place, place.parent))
    return origin.removeprefix(next((folder for folder in folders if origin.startswith(folder)), ""))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source's git commit, "+" if it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository further up is someone else's
        return None

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
