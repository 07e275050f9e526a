"""Several devices train one encoder: each takes its share of a batch, and all keep the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from matvit.errors import RecipeError
from matvit.training import steps
from matvit.training.loop import train
from matvit.training.processes import average_gradients, check_equal
from matvit.training.state import only_run

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
from matvit.training import loop, steps
from matvit.training.recipe import Recipe

clip, norms = steps.nn.utils.clip_grad_norm_, []


def note(*arguments):
    norms.append(float(clip(*arguments)))


if __name__ == "__main__":
    steps.nn.utils.clip_grad_norm_ = note
    loop.train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), out=Path(sys.argv[2]))
    print("returned", norms, flush=True)
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

    draw, clip = steps.draw_batch, torch.nn.utils.clip_grad_norm_
    norms: list[float] = []
    monkeypatch.setattr(steps, "draw_batch", both_shares)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(float(clip(*given))))
    train(make_recipe(stages=stages), out=tmp_path / "alone")
    # AdamW's steps are the same for a gradient twice as long, so the gradients are compared, too.
    assert json.loads(done.stdout.partition("returned")[2]) == pytest.approx(norms, rel=1e-3)
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


def test_where_the_first_process_is_refused_the_others_end_with_it(data, tmp_path, make_recipe):
    with only_run(tmp_path / "run"):
        done = train_in_processes(make_recipe(devices=2), tmp_path)
    assert done.returncode == 1  # its own, not of a kill
    assert "is training in this folder" in done.stderr.splitlines()[-1]
    assert "rank1" not in done.stderr


def test_a_step_that_leaves_no_gradient_has_nothing_to_average():
    average_gradients(SimpleNamespace(world_size=2), [torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("drifted", [None, "encoder", "heads"])
def test_weights_that_have_drifted_apart_are_told_though_their_sums_are_equal(drifted):
    """As where one device ordered two hidden units the other way round."""

    def gather(digest):
        gathered.append(digest)
        return torch.stack([gathered[0], digest])

    gathered: list[torch.Tensor] = []
    fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"), all_gather=gather)
    modules = {"encoder": torch.nn.Linear(3, 2, dtype=torch.bfloat16), "heads": torch.nn.BatchNorm1d(2)}
    torch.nn.init.normal_(modules["heads"].weight)
    check_equal(fabric, *modules.values())
    if drifted is None:
        check_equal(fabric, *modules.values())
        return
    with torch.no_grad():
        modules[drifted].weight.copy_(modules[drifted].weight.flip(0))
    with pytest.raises(RecipeError, match="drifted apart"):
        check_equal(fabric, *modules.values())


def test_a_batch_that_cannot_be_shared_is_refused(make_recipe):
    with pytest.raises(ValueError, match="cannot be shared by 3 devices"):
        make_recipe(devices=3)


def test_more_devices_than_there_are_is_one_sentence(data, tmp_path, make_recipe, monkeypatch):
    def none(**_):
        raise RuntimeError("requested 2, available 1\nand more")

    monkeypatch.setattr("matvit.training.processes.Fabric", none)
    with pytest.raises(RecipeError, match="2 devices cannot be had"):
        train(make_recipe(devices=2), out=tmp_path)
