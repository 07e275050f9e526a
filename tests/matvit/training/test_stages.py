"""Stages that train what S, M and L own, and those whose result is an average."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from matvit import MatViT
from matvit.private import OWNERS
from matvit.spec import Granularity
from matvit.training import loop, stages, steps
from matvit.training.loop import train

FULL = {"name": "full", "steps": 4, "learning_rate": 1e-3, "full": {"classification": 1}}
OWN = {
    "name": "own",
    "steps": 4,
    "learning_rate": 1e-2,
    "private": 2,
    "freeze": True,
    "fixed": ["S"],
    "ladder": ["M", "L"],
    "sampled": 2,
    "submodels": {"cosine": 1, "similarity": 1, "contrast": 0.5},
}


def flat(model: MatViT) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.vit.state_dict().values()]).cpu()


def test_a_step_trains_one_drawn_encoder_alone_where_the_full_one_has_no_losses(
    data, make_recipe, tmp_path, monkeypatch
):
    drawn: list[str] = []
    forward = MatViT.forward

    def note(self, images, spec=None):
        if torch.is_grad_enabled():
            drawn.append(str(spec))
        return forward(self, images, spec)

    monkeypatch.setattr(MatViT, "forward", note)
    stage = {"name": "drawn", "steps": 24, "learning_rate": 1e-3, "submodels": {"classification": 1}}
    stage |= {"fixed": [], "sampled": 1, "ladder": ["S", "M", "L", "XL", "XL"]}
    train(make_recipe(stages=[stage]), out=tmp_path / "run")
    assert len(drawn) == 24
    assert set(drawn) == {"S", "M", "L", "XL"}
    assert drawn.count("XL") > max(drawn.count(size) for size in "SML")


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_frozen_stage_trains_what_each_granularity_owns_and_nothing_else(
    data, make_recipe, tmp_path, monkeypatch, storage
):
    begun: list[torch.Tensor] = []
    spaces: list[str] = []
    ended: list[torch.Tensor] = []

    def begin(run, stage):
        stages.begin_stage(run, stage)
        begun.append(flat(run.model))
        spaces.append(run.model.space_id)

    def end(run, stage):
        stages.end_stage(run, stage)
        ended.append(flat(run.model))
        spaces.append(run.model.space_id)

    monkeypatch.setattr(loop, "begin_stage", begin)
    monkeypatch.setattr(loop, "end_stage", end)
    model = train(make_recipe(stages=[FULL, OWN | {"ema": 0.9}], storage=storage), out=tmp_path / "run")
    assert not torch.equal(begun[0], ended[0])
    assert torch.equal(begun[1], ended[1])
    assert spaces[2] == spaces[3]
    assert model.private is not None
    assert model.private.config.rank == 2
    for owner in OWNERS:
        for block in model.private.blocks[owner.value]:
            assert all(up.abs().sum() > 0 for name, up in block.up.items()), owner
    saved = MatViT.from_pretrained(tmp_path / "run" / "encoder")
    assert all(map(torch.equal, saved.private.state_dict().values(), model.private.state_dict().values()))


def test_training_what_submodels_own_brings_them_nearer_to_the_frozen_encoder(data, make_recipe, tmp_path):
    quiet = {"augmentation": {"colour_jitter": 0.0, "grayscale": 0.0, "scale": [0.9, 1.0]}}
    longer = OWN | quiet | {"steps": 40, "submodels": {"cosine": 1}}
    losses: list[float] = []

    def note(event):
        if event.stage == "train own":
            losses.append(float(event.note.split()[1].rstrip(",")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_LOG_STEPS", 1)
        train(make_recipe(stages=[FULL, longer]), out=tmp_path / "run", progress=note)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_fitted_stage_begins_nearer_to_the_full_encoder(data, make_recipe, tmp_path):
    one_step = OWN | {"submodels": {"cosine": 1}, "steps": 1, "private": 32}

    def first_loss(fit: bool) -> float:
        train(make_recipe(stages=[FULL, one_step | {"fit": fit}]), out=tmp_path / str(fit))
        return json.loads((tmp_path / str(fit) / "log.jsonl").read_text().splitlines()[-1])["loss"]

    assert first_loss(True) < 0.7 * first_loss(False)


def test_shared_weights_and_private_parameters_may_be_trained_together(data, make_recipe, tmp_path):
    both = OWN | {"freeze": False, "full": {"classification": 1, "cosine": 1}}
    alone = train(make_recipe(stages=[FULL]), out=tmp_path / "alone")
    model = train(make_recipe(stages=[FULL, both]), out=tmp_path / "both")
    assert model.space_id != alone.space_id
    assert model.private.blocks[Granularity.S.value][0].up["mlp-fc2-weight-weight"].abs().sum() > 0


def test_a_mixed_spec_whose_own_blocks_were_dropped_does_not_stop_a_frozen_stage(data, make_recipe, tmp_path):
    stage = OWN | {"fixed": [], "ladder": ["mixed-d1"], "sampled": 1, "steps": 30, "submodels": {"cosine": 1}}
    train(make_recipe(stages=[FULL, stage]), out=tmp_path / "run")


def test_the_result_of_a_stage_is_the_asked_share_of_its_end(data, make_recipe, tmp_path):
    start, end, mixed = (
        flat(train(make_recipe(stages=chain), out=tmp_path / str(number)))
        for number, chain in enumerate(
            (
                [FULL],
                [FULL, FULL | {"name": "more"}],
                [FULL, FULL | {"name": "more", "average": 0.25}],
            )
        )
    )
    assert not torch.equal(start, end)
    torch.testing.assert_close(mixed, 0.75 * start + 0.25 * end, rtol=0, atol=1e-6)


def test_the_result_of_a_stage_with_ema_is_the_moving_average_of_its_weights(data, make_recipe, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    step = steps._step

    def look(run, *rest):
        loss = step(run, *rest)
        seen.append(flat(run.model))
        return loss

    monkeypatch.setattr(steps, "_step", look)
    model = train(make_recipe(stages=[FULL | {"ema": 0.5}]), out=tmp_path / "run")
    mean = seen[0]  # timm's warm-up: the first step whole, then 1 - (1 + n) ^ -2/3 of what was, at most the decay
    for number, weights in enumerate(seen[1:], start=1):
        kept = min(0.5, 1 - (1 + number) ** (-2 / 3))
        mean = kept * mean + (1 - kept) * weights
    torch.testing.assert_close(flat(model), mean, rtol=0, atol=1e-6)
    assert not torch.allclose(flat(model), seen[-1], atol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [(0.0, [1.0, 0.85, 0.5, 0.15]), (0.5, [0.0, 0.5, 0.5, 0.15])],
)
def test_the_rate_warms_up_from_0_and_without_warm_up_begins_in_full(
    data, make_recipe, tmp_path, monkeypatch, warmup, rates
):
    monkeypatch.setattr(steps, "_LOG_STEPS", 1)
    recipe = make_recipe(stages=[FULL], optimiser={"warmup": warmup, "layer_decay": 1.0})
    train(recipe, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * rate for rate in rates], abs=1e-5)


@pytest.mark.parametrize(
    ("stages_", "sentence"),
    [
        ([FULL, OWN | {"private": None}], "freezes all that it could train"),
        ([FULL, OWN | {"full": {"cosine": 1}}], "freezes the full encoder: leave out its losses"),
        ([FULL, OWN | {"average": 0.5}], "freezes the full encoder: leave out its losses and average"),
        ([FULL, OWN | {"submodels": None}], "encoder without a loss|trains no submodels"),
        ([FULL, OWN, OWN | {"name": "other", "private": 3}], "must keep the private rank before it: private: 2"),
        ([FULL, OWN, FULL | {"name": "other"}], "must keep the private rank before it: private: 2"),
        (
            [FULL, OWN | FULL | {"name": "own", "private": None, "freeze": False, "fit": True}],
            "fits private parameters: be the first",
        ),
        ([FULL, OWN, OWN | {"name": "other", "fit": True}], "fits private parameters: be the first"),
        ([FULL | {"average": 0}], "greater than 0"),
        ([FULL | {"ema": 1}], "less than 1"),
    ],
)
def test_stages_that_do_not_fit_are_refused(make_recipe, stages_, sentence):
    with pytest.raises(ValidationError, match=sentence):
        make_recipe(stages=stages_)
