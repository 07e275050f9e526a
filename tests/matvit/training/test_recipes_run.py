"""Every packaged recipe runs: all its stages, losses and ladders, two steps each, small, on generated pictures."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from matvit.training import stages
from matvit.training.loop import train
from matvit.training.recipe import Recipe, load_recipe

PACKAGED = sorted(
    entry.name.removesuffix(".yaml") for entry in resources.files("matvit.training").joinpath("recipes").iterdir()
)


def smoke_form(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what costs time made small; stages, specs, resolutions and losses as they are."""
    torch.manual_seed(0)
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    fields |= {"precision": "32-true", "compile": False, "devices": 1}
    if recipe.encoder.checkpoint is None:
        fields["encoder"] |= {"weights": None, "pretrained": False}
        fields["encoder"]["model_args"] |= {"embed_dim": 48}
    else:  # "runs/NAME/encoder"
        first = load_recipe(Path(recipe.encoder.checkpoint).parent.name)
        train(smoke_form(first, folder), out=folder / "first")
        fields["encoder"]["checkpoint"] = str(folder / "first" / "encoder")
    if recipe.teacher is not None:
        save_file(timm.create_model("test_resnet").state_dict(), folder / "teacher.safetensors")
        small = {"timm_model": "test_resnet", "weights": str(folder / "teacher.safetensors"), "image_size": 32}
        fields["teacher"] |= small | {"model_args": {}, "views": 1}
    for one in fields["data"]:
        one |= {"path": "shapes", "classes": None, "exclude": [], "resolution": 40, "batch": 2}
    if recipe.validation is not None:
        fields["validation"] = {"queries": "shapes"}
    for stage in fields["stages"]:
        stage |= {"steps": 2, "batches": [2 for _ in stage["batches"]]}
    return Recipe.model_validate(fields)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_smoke_form_of_a_packaged_recipe_gives_an_encoder(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(stages, "_FIRST_PICTURES", 6)
    recipe = load_recipe(name)
    model = train(smoke_form(recipe, tmp_path), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [stage.name for stage in recipe.stages]
    assert {"S", "XL"} <= {row["name"] for row in model.pareto}
    assert model.encoder("S").embed([data / "shapes" / "dark" / "0.png"]).shape == (1, 48)


def test_the_guides_recipe_trains_on_class_folders_from_a_saved_timm_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_FIRST_PICTURES", 6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MATVIT_DATA")
    guide = (Path(__file__).parents[3] / "docs/guides/training.md").read_text()
    [text] = re.findall(r"```yaml\n(name: .*?)```", guide, flags=re.DOTALL)
    fields = Recipe.model_validate(yaml.safe_load(text)).model_dump(mode="json")
    sizes = {"embed_dim": 24, "num_heads": 2}
    fields |= {"precision": "32-true", "encoder": fields["encoder"] | {"model_args": sizes}}
    fields["data"][0]["batch"] = 4
    for stage in fields["stages"]:
        stage["steps"] = 2
    (data / "shapes").rename("birds")
    for name in ("dark", "light"):
        Path("birds-test", name).mkdir(parents=True)
        Image.effect_noise((40, 40), 60).save(Path("birds-test", name, "1.png"))
    start = timm.create_model(fields["encoder"]["timm_model"], **sizes)
    save_file(start.state_dict(), fields["encoder"]["weights"])
    model = train(Recipe.model_validate(fields), out=Path("runs/birds"))
    assert model.record["data"][0]["path"] == "birds"
    assert {"S", "M-d10-r84"} <= model.record["metrics"]["validation"].keys()
