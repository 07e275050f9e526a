"""Several devices train one encoder: each takes its share of a batch, and all keep the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from matvit.errors import RecipeError
from matvit.training import loop
from matvit.training.loop import train

OWN = {
    "name": "own",
    "steps": 2,
    "learning_rate": 1e-2,
    "private": 2,
    "freeze": True,
    "ema": 0.9,
    "submodels": {"cosine": 1},
}
PROGRAM = """
import sys
from pathlib import Path
from matvit.training.loop import train
from matvit.training.recipe import Recipe

if __name__ == "__main__":
    train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), out=Path(sys.argv[2]))
    print("returned", flush=True)
"""


def train_in_processes(recipe, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(PROGRAM)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, str(folder / "train.py"), str(folder / "recipe.json"), str(folder / "run")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def test_two_processes_train_as_one_with_both_shares(data, tmp_path, make_recipe, make_fields, monkeypatch):
    """The gradient of the whole batch is the mean of its halves' where pictures are not compared with others."""
    stages = [make_fields()["stages"][0]]
    done = train_in_processes(make_recipe(stages=stages, devices=2), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("returned") == 1

    def both_shares(sets, *, key, **how):
        halves = [replace(one, batch=one.batch // 2) for one in sets]
        first, second = (draw(halves, key=one, **how) for one in (key, (*key, 1)))
        targets = [torch.cat(pair) for pair in zip(first.targets, second.targets, strict=True)]
        return replace(first, images=torch.cat([first.images, second.images]), targets=targets)

    draw = loop.draw_batch
    monkeypatch.setattr(loop, "draw_batch", both_shares)
    train(make_recipe(stages=stages), out=tmp_path / "alone")
    weights = [load_file(tmp_path / run / "encoder" / "model.safetensors") for run in ("run", "alone")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


def test_two_processes_train_submodels_log_once_and_record_it(data, tmp_path, make_recipe, make_fields):
    stages = [*make_fields()["stages"], OWN]
    done = train_in_processes(make_recipe(stages=stages, devices=2), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("full", 4), ("nested", 4), ("own", 2)]
    record = json.loads((tmp_path / "run" / "encoder" / "training.json").read_text())
    assert record["recipe"]["devices"] == 2


def test_a_batch_that_cannot_be_shared_is_refused(make_recipe):
    with pytest.raises(ValueError, match="cannot be shared by 3 devices"):
        make_recipe(devices=3)


def test_more_devices_than_there_are_is_one_sentence(data, tmp_path, make_recipe, monkeypatch):
    def none(**_):
        raise RuntimeError("requested 2, available 1\nand more")

    monkeypatch.setattr("matvit.training.processes.Fabric", none)
    with pytest.raises(RecipeError, match="2 devices cannot be had"):
        train(make_recipe(devices=2), out=tmp_path)
