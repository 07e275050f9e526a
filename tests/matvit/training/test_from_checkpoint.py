"""Going on from a checkpoint: its order and axes stay, and with private parameters its indices do, too."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from matvit import MatViT
from matvit.checkpoint import read_config
from matvit.errors import CheckpointError, RecipeError
from matvit.private import OWNERS, PrivateConfig
from matvit.training import record, steps
from matvit.training.loop import train

OWN = {
    "name": "own",
    "steps": 2,
    "learning_rate": 1e-2,
    "private": 2,
    "freeze": True,
    "ladder": ["M", "L", "M-d1-r16"],
    "sampled": 3,
    "submodels": {"cosine": 1},
}
MORE = {
    "name": "more",
    "steps": 2,
    "learning_rate": 1e-3,
    "full": {"cosine": 1},
    "submodels": {"cosine": 1, "similarity": 1},
}


@pytest.fixture
def checkpoint(data, make_recipe, tmp_path, request):
    """A trained encoder's folder."""
    train(make_recipe(storage=getattr(request, "param", "float32")), out=tmp_path / "first")
    return str(tmp_path / "first" / "encoder")


def going_on(checkpoint, *stages):
    return {"encoder": {"checkpoint": checkpoint}, "stages": list(stages), "name": "second"}


@pytest.mark.parametrize("checkpoint", ["float32", "int8"], indirect=True)
def test_what_submodels_own_is_trained_for_an_encoder_whose_indices_stay_valid(checkpoint, make_recipe, tmp_path):
    before = MatViT.from_pretrained(checkpoint)
    model = train(make_recipe(**going_on(checkpoint, OWN), storage=None), out=tmp_path / "run")
    assert model.space_id == before.space_id
    assert read_config(tmp_path / "run" / "encoder").weights.storage == before.record["recipe"]["storage"]
    assert (model.axes, model.name) == (before.axes, "second")
    assert all(
        block.up["mlp-fc2-weight-weight"].any() for owner in OWNERS for block in model.private.blocks[owner.value]
    )


def test_the_first_stage_may_align_to_the_checkpoint_and_leaves_its_order(checkpoint, make_recipe, tmp_path):
    before = MatViT.from_pretrained(checkpoint)
    model = train(make_recipe(**going_on(checkpoint, MORE | {"learning_rate": 1e-9})), out=tmp_path / "run")
    for name, tensor in model.vit.state_dict().items():
        torch.testing.assert_close(tensor, before.vit.state_dict()[name], rtol=0, atol=1e-6)
    assert model.axes == before.axes


def test_what_its_submodels_own_is_trained_further(checkpoint, make_recipe, tmp_path):
    first = train(make_recipe(**going_on(checkpoint, OWN)), out=tmp_path / "owning")
    owning = str(tmp_path / "owning" / "encoder")
    second = train(make_recipe(**going_on(owning, OWN)), out=tmp_path / "again")
    assert second.space_id == first.space_id
    assert not torch.equal(
        *(one.private.blocks["S"][0].up["mlp-fc2-weight-weight"] for one in (first, second)),
    )
    for stage, sentence in (
        (MORE, "stage 'more' does not train what .* own; give it private: 2"),
        (OWN | {"private": 3}, "stage 'own' does not train what .* own; give it private: 2"),
        (OWN | {"fit": True}, "stage 'own' fits what .* own already; leave fit out"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            train(make_recipe(**going_on(owning, stage)), out=tmp_path / "other")


def adapted(checkpoint, folder, *, rank):
    """The checkpoint as `matvit adapt` leaves it: its last block owns full deltas, too."""
    model = MatViT.from_pretrained(checkpoint)
    private = model.add_private(PrivateConfig(rank=rank, last=True))
    with torch.no_grad():
        for parameter in private.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder)
    return str(folder)


def test_what_adapting_fitted_is_trained_further_and_resumed(checkpoint, make_recipe, tmp_path, monkeypatch):
    def stop_in_own(event):
        if event.stage == "train own":
            raise InterruptedError

    recipe = make_recipe(**going_on(adapted(checkpoint, tmp_path / "adapted", rank=2), OWN))
    whole = train(recipe, out=tmp_path / "whole")
    monkeypatch.setattr(steps, "_LOG_STEPS", 1)
    monkeypatch.setattr(steps, "_SAVE_SECONDS", 0.0)
    for _ in range(2):  # at the first step, which was not saved, and at the second
        with pytest.raises(InterruptedError):
            train(recipe, out=tmp_path / "parts", progress=stop_in_own)
        monkeypatch.setattr(steps, "_LOG_STEPS", 2)
    parts = train(recipe, out=tmp_path / "parts")
    assert parts.weights_sha256 == whole.weights_sha256
    assert parts.private.config == PrivateConfig(rank=2, last=True)


@pytest.mark.parametrize("stage", [OWN, MORE])
def test_an_adapted_checkpoint_whose_last_block_alone_owns_something_is_refused(
    checkpoint, make_recipe, tmp_path, stage
):
    recipe = make_recipe(**going_on(adapted(checkpoint, tmp_path / "adapted", rank=None), stage))
    with pytest.raises(RecipeError, match="their last block's alone; go on from what was adapted"):
        train(recipe, out=tmp_path / "run")


def test_a_table_of_the_checkpoint_is_not_taken_for_the_results(checkpoint, make_recipe, tmp_path, monkeypatch):
    """Where measuring fails, what was trained is saved without a table, and measured by the same command later."""

    def fail(*_, **__):
        raise InterruptedError

    recipe = make_recipe(**going_on(checkpoint, MORE), validation={"queries": "shapes"})
    with monkeypatch.context() as patch:
        patch.setattr(record, "cross_test", fail)
        with pytest.raises(InterruptedError):
            train(recipe, out=tmp_path / "run")
    assert MatViT.from_pretrained(tmp_path / "run" / "encoder").pareto == ()
    assert train(recipe, out=tmp_path / "run").pareto[0]["quality"]["recall@1"] >= 0


def test_its_record_stays_and_its_licence_credits_and_notes_are_inherited(checkpoint, make_recipe, tmp_path):
    first = MatViT.from_pretrained(checkpoint)
    first.record |= {"license": "mit", "credits": ["start"], "notes": ["unseen"], "metrics": {"S": 1}}
    first.save_pretrained(tmp_path / "licensed")
    first = MatViT.from_pretrained(tmp_path / "licensed")
    kept = {name: first.record[name] for name in first.record.keys() - {"metrics", "license", "credits", "notes"}}
    kept["data"] = [{name: one[name] for name in one.keys() - {"class_names"}} for one in kept["data"]]
    second = train(
        make_recipe(**going_on(str(tmp_path / "licensed"), MORE), notes=["mine"]), out=tmp_path / "second"
    ).record
    assert (second["license"], second["credits"], second["notes"]) == ("mit", ["start"], ["mine"])
    assert second["before"] == kept | {"weights_sha256": first.weights_sha256}
    third = train(
        make_recipe(**going_on(str(tmp_path / "second" / "encoder"), MORE), license="isc"), out=tmp_path / "third"
    ).record
    assert (third["license"], third["before"]["before"]) == ("isc", second["before"])


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        ({}, "give timm_model or checkpoint, and not both"),
        ({"checkpoint": "x", "timm_model": "vit_tiny_patch16_224"}, "give timm_model or checkpoint, and not both"),
        ({"checkpoint": "x", "image_size": 32}, "a checkpoint brings its own image_size: leave that out"),
        ({"checkpoint": "x", "depth_axis": True}, "a checkpoint brings its own depth_axis"),
    ],
)
def test_a_start_that_is_two_or_none_is_refused(make_recipe, encoder, sentence):
    with pytest.raises(ValidationError, match=sentence):
        make_recipe(encoder=encoder)


def test_a_spec_that_the_checkpoint_cannot_give_and_a_missing_checkpoint_are_one_sentence(
    checkpoint, make_recipe, tmp_path
):
    with pytest.raises(RecipeError, match="stage 'more' asks for 'M-h1': 1 of 2 attention heads cannot be kept"):
        train(make_recipe(**going_on(checkpoint, MORE | {"ladder": ["M-h1"]})), out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(make_recipe(**going_on("gone", MORE)), out=tmp_path / "run")
