"""Whole runs of a tiny recipe: without labels, with a teacher, and what the checkpoint says of itself."""

from __future__ import annotations

import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from matvit.errors import DatasetError, RecipeError
from matvit.training import loop, record, sampling, stages, steps
from matvit.training.heads import Heads
from matvit.training.loop import train
from matvit.training.recipe import TeacherRecipe


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "teacher.safetensors")
    return {
        "timm_model": "test_resnet",
        "model_args": {"num_classes": 7},
        "weights": str(tmp_path / "teacher.safetensors"),
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "views": 2,
    }


def label_free(steps: int = 3):
    common = {"steps": steps, "learning_rate": 1e-3}
    return [
        common | {"name": "full", "full": {"teacher_classes": 1, "teacher_features": 1}},
        common | {"name": "nested", "full": {"cosine": 1}, "submodels": {"cosine": 1, "similarity": 1}},
    ]


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_trained(data, make_recipe, make_fields, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(make_recipe(stages=make_fields()["stages"][:1]), out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_label_free_run_with_a_teacher_gives_an_encoder(data, make_recipe, teacher, tmp_path):
    model = train(make_recipe(teacher=teacher, stages=label_free()), out=tmp_path / "run")
    embedded = model.encoder("S").embed([data / "shapes" / "dark" / "0.png"])
    assert embedded.shape == (1, 32)
    assert float((embedded**2).sum()) == pytest.approx(1, abs=1e-4)


def test_labels_do_not_matter_to_a_label_free_run(data, make_recipe, teacher, tmp_path):
    recipe = make_recipe(teacher=teacher, stages=label_free())
    first = train(recipe, out=tmp_path / "first").space_id
    for picture in sorted((data / "shapes" / "dark").glob("[345].png")):  # the same order, other classes
        picture.rename(data / "shapes" / "light" / f"-{picture.name}")
    assert train(recipe, out=tmp_path / "second").space_id == first


def test_a_resumed_later_stage_sees_the_teachers_crops_of_the_first(data, make_recipe, teacher, tmp_path):
    first, _ = label_free()
    second = first | {"name": "again", "augmentation": {"scale": [0.9, 1.0]}}
    recipe = make_recipe(teacher=teacher, stages=[first, second])
    whole = train(recipe, out=tmp_path / "whole").space_id

    def stop_in_second(event):
        if event.stage == "train again":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, out=tmp_path / "parts", progress=stop_in_second)  # the state is of the stage's begin
    assert train(recipe, out=tmp_path / "parts").space_id == whole


def test_a_run_whose_teacher_was_replaced_meanwhile_is_not_continued(data, make_recipe, teacher, tmp_path):
    recipe = make_recipe(teacher=teacher, stages=label_free())

    def stop_in_second(event):
        if event.stage == "train nested":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe, out=tmp_path / "run", progress=stop_in_second)
    other = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(other, tmp_path / "teacher.safetensors")
    with pytest.raises(RecipeError, match="belongs to other start weights or another teacher at the same place"):
        train(recipe, out=tmp_path / "run")


def test_what_is_aligned_to_is_the_encoder_before_it_was_first_nested(data, make_recipe, monkeypatch, tmp_path):
    stages = make_recipe().model_dump(mode="json")["stages"]
    stages.append(stages[1] | {"name": "longer"})
    anchors: dict[str, list[torch.Tensor]] = {}
    step = steps._step

    def look(run, stage, *rest):
        if run.anchor is not None:
            anchors.setdefault(stage.name, [tensor.clone() for tensor in run.anchor.vit.state_dict().values()])
        return step(run, stage, *rest)

    monkeypatch.setattr(steps, "_step", look)
    train(make_recipe(stages=stages), out=tmp_path / "run")
    alone = train(make_recipe(stages=stages[:1]), out=tmp_path / "alone").vit.state_dict().values()
    assert list(anchors) == ["nested", "longer"]
    for seen in anchors.values():
        assert all(map(torch.equal, seen, alone))


def test_a_stage_before_nesting_is_held_to_the_encoder_that_it_began_with(data, make_recipe, monkeypatch, tmp_path):
    common = {"steps": 2, "learning_rate": 1e-3}
    first = common | {"name": "full", "full": {"classification": 1}}
    held = common | {"name": "held", "full": {"classification": 1, "cosine": 1}}
    nested = common | {"name": "nested", "full": {"cosine": 1}, "submodels": {"cosine": 1}}
    anchors: dict[str, list[torch.Tensor]] = {}
    step = steps._step

    def look(run, stage, *rest):
        if run.anchor is not None:
            anchors[stage.name] = [tensor.clone() for tensor in run.anchor.vit.state_dict().values()]
        return step(run, stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_step", look)
        train(make_recipe(stages=[first, held, nested]), out=tmp_path / "run")
    for chain, aligned in (([first], "held"), ([first, held], "nested")):
        begun = train(make_recipe(stages=chain), out=tmp_path / aligned).vit.state_dict().values()
        assert all(map(torch.equal, anchors[aligned], begun))


def test_pictures_are_cut_for_the_largest_encoder_of_a_stage(data, make_recipe, make_fields, monkeypatch, tmp_path):
    full, nested = make_fields()["stages"]
    sizes: dict[int, set[int]] = {}
    draw = steps.draw_batch

    def look(sets, *, image_size, key, **how):
        sizes.setdefault(key[1], set()).add(image_size)
        return draw(sets, image_size=image_size, key=key, **how)

    monkeypatch.setattr(steps, "draw_batch", look)
    larger = nested | {"ladder": ["M", "mixed-r40", "L-r48"]}
    train(make_recipe(stages=[full | {"resolutions": [16]}, larger]), out=tmp_path / "run")
    assert sizes == {0: {16}, 1: {48}}


def test_a_later_nested_stage_alone_may_align(data, make_recipe, tmp_path):
    common = {"steps": 2, "learning_rate": 1e-3, "full": {"classification": 1}}
    nested = common | {"name": "nested", "submodels": {"classification": 1}}
    aligned = common | {"name": "aligned", "submodels": {"cosine": 1}}
    train(make_recipe(stages=[common | {"name": "full"}, nested, aligned]), out=tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["anchor"] is not None


def test_a_stage_may_take_other_batches(data, make_recipe, monkeypatch, tmp_path):
    stages = make_recipe().model_dump(mode="json")["stages"]
    stages[1]["batches"] = [6]
    seen: list[tuple[str, int]] = []
    step = steps._step

    def look(run, stage, optimiser, batch, *rest):
        seen.append((stage.name, len(batch.images)))
        return step(run, stage, optimiser, batch, *rest)

    monkeypatch.setattr(steps, "_step", look)
    model = train(make_recipe(stages=stages), out=tmp_path / "run")
    assert set(seen) == {("full", 8), ("nested", 6)}
    assert model.record["pictures_seen"] == 4 * 8 + 4 * 6


def test_the_log_says_how_quick_a_run_is(data, make_recipe, tmp_path):
    notes: list[str] = []
    train(make_recipe(), out=tmp_path / "run", progress=lambda event: notes.append(event.note))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] > 0 and row["mfu"] is None for row in rows)  # a CPU's peak is not known
    assert any("pictures/s" in note for note in notes)


def test_training_for_prefixes_makes_short_embeddings_better(data, make_recipe, monkeypatch, tmp_path):
    """Two classes are told apart further by the first four numbers where that was asked for."""
    monkeypatch.setattr(sampling, "PREFIXES", (4,))

    def spread(prefix: float) -> float:
        stage = {"name": "full", "steps": 30, "learning_rate": 3e-3, "full": {"classification": 1, "prefix": prefix}}
        model = train(make_recipe(stages=[stage]), out=tmp_path / str(prefix))
        embedded = model.encoder("XL").embed(sorted((data / "shapes").rglob("*.png")))[:, :4]
        dark, light = np.split(embedded / np.linalg.norm(embedded, axis=1, keepdims=True), 2)
        return float((dark @ dark.T).mean() + (light @ light.T).mean() - 2 * (dark @ light.T).mean())

    assert spread(1.0) > spread(0.0)


def test_tar_shards_train_the_same_encoder_as_the_folders_they_were_made_of(data, make_recipe, tmp_path):
    for shard, name in enumerate(("dark", "light")):
        with tarfile.open(data / f"packed-{shard}.tar", "w") as tar:
            for picture in sorted((data / "shapes" / name).iterdir()):
                tar.add(picture, f"{name}/{picture.name}")
    packed = [{"path": "packed-*.tar", "resolution": 40, "batch": 8}]
    folders = train(make_recipe(), out=tmp_path / "folders")
    assert train(make_recipe(data=packed), out=tmp_path / "packed").space_id == folders.space_id


def test_heads_without_a_teacher_have_classifiers_only(teacher):
    names = {name.split(".")[0] for name, _ in Heads(8, [2, 3], None).state_dict().items()}
    assert names == {"classes"}
    taught = Heads(8, [2], TeacherRecipe.model_validate(teacher))
    assert taught.feature_mean.shape == (96,)
    assert taught.teacher_classes.prototypes.shape == (7, 8)


@pytest.mark.parametrize("on", ["host", "device"])
def test_a_batch_without_room_in_memory_is_told_with_its_stage(data, make_recipe, monkeypatch, tmp_path, on):
    def refuse(*_, **__):
        if on == "device":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(steps, "draw_batch", refuse)
    sentence = r"stage 'full': its batch of 8 pictures does not fit into the memory of cpu; lower its batches"
    with pytest.raises(RecipeError, match=sentence):
        train(make_recipe(), out=tmp_path / "run")


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("module", "name", "sentence"),
    [
        (torch, "save", r"state\.pt: the host's memory has no room to make it; free some, and the same command"),
        (loop, "begin_stage", r"stage 'full': what it begins with \(order, averages, optimiser\) does not fit"),
        (record, "cross_test", r"encoder: measuring and saving it does not fit into the memory of cpu; free some, and"),
        (stages, "teach", "teacher: what it says of all pictures does not fit into the memory of cpu beside them"),
    ],
)
def test_what_has_no_room_in_memory_is_not_blamed_on_the_batch(
    data, make_recipe, teacher, monkeypatch, tmp_path, module, name, sentence
):
    recipe = make_recipe(teacher=teacher, stages=label_free(), validation={"queries": "shapes"})
    monkeypatch.setattr(module, name, out_of_memory)
    with pytest.raises(RecipeError, match=sentence):
        train(recipe, out=tmp_path / "run")


def test_graphs_are_counted_for_the_run_alone(make_recipe):
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    before = torch._dynamo.config.recompile_limit
    with loop.many_graphs(make_recipe(compile=True), on_cuda):
        assert torch._dynamo.config.recompile_limit == 32
    assert torch._dynamo.config.recompile_limit == before


def test_validation_pictures_are_read_once_and_a_float32_encoder_measured_once(
    data, make_recipe, monkeypatch, tmp_path
):
    calls: list[str] = []

    def note(name: str) -> None:
        call = getattr(record, name)
        monkeypatch.setattr(record, name, lambda *given, **how: calls.append(name) or call(*given, **how))

    note("read_dataset")
    note("cross_test")
    validation = {"queries": "shapes"}
    exact = train(make_recipe(validation=validation), out=tmp_path / "float32")
    assert (calls, list(exact.record["metrics"])) == (["read_dataset", "cross_test"], ["validation"])
    rounded = train(make_recipe(validation=validation, storage="int8"), out=tmp_path / "int8")
    assert list(rounded.record["metrics"]) == ["validation", "before_storage"]


def test_a_loss_that_is_not_finite_stops_the_run(data, make_recipe, tmp_path):
    stage = {"name": "full", "steps": 40, "learning_rate": 1e30, "full": {"classification": 1}}
    with pytest.raises(RecipeError, match="lower its learning_rate"):
        train(make_recipe(stages=[stage], optimiser={"warmup": 0.0}), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("bad", "kept"), [("a", "nothing was saved before"), ("b", r"state\.pt holds all of stage 'a'")]
)
def test_the_first_loss_that_is_not_finite_is_named_with_the_last_good_save(
    data, make_recipe, tmp_path, monkeypatch, bad, kept
):
    step = steps._step

    def poison_the_third(run, stage, *rest):
        loss = step(run, stage, *rest)
        return loss * torch.nan if (stage.name, run.step) == (bad, 2) else loss

    monkeypatch.setattr(steps, "_step", poison_the_third)
    common = {"steps": 5, "learning_rate": 1e-3, "full": {"classification": 1}}
    stages = [common | {"name": name} for name in ("a", "b")]
    with pytest.raises(RecipeError, match=f"stage '{bad}': the loss is nan at step 3; lower its .*{kept}"):
        train(make_recipe(stages=stages), out=tmp_path / "run")


def test_one_class_is_refused_where_classes_are_to_be_told_apart(data, make_recipe, teacher, tmp_path):
    one = [{"path": "shapes", "resolution": 40, "batch": 8, "classes": "0:1"}]
    with pytest.raises(DatasetError, match="has one class, 'dark', and classification needs two"):
        train(make_recipe(data=one), out=tmp_path / "run")
    train(make_recipe(data=one, teacher=teacher, stages=label_free(1)), out=tmp_path / "run")


def test_start_weights_of_another_backbone_are_one_sentence(data, make_recipe, make_fields, tmp_path):
    train(make_recipe(stages=make_fields()["stages"][:1]), out=tmp_path / "run")
    weights = tmp_path / "run" / "encoder" / "model.safetensors"
    encoder = make_fields()["encoder"] | {"weights": str(weights)}
    encoder["model_args"] |= {"img_size": 32}
    train(make_recipe(encoder=encoder, stages=make_fields()["stages"][:1]), out=tmp_path / "again")
    encoder["model_args"] |= {"embed_dim": 64}
    with pytest.raises(RecipeError, match=r"model\.safetensors: start weights cannot be loaded") as caught:
        train(make_recipe(encoder=encoder), out=tmp_path / "other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("poisoned", ["weight", "moment"])
@pytest.mark.parametrize(("length", "save_seconds"), [(3, 60.0), (9, 0.0)])
def test_what_is_not_finite_is_never_saved_though_the_loss_is(
    data, make_recipe, tmp_path, monkeypatch, poisoned, length, save_seconds
):
    step = steps._step

    def poison_the_third(run, stage, optimiser, *rest):
        loss = step(run, stage, optimiser, *rest)
        if run.step == 2:
            weight = run.model.vit.pos_embed
            (weight if poisoned == "weight" else optimiser.state[weight]["exp_avg_sq"]).data[0, 0, 0] = torch.inf
        return loss

    monkeypatch.setattr(steps, "_step", poison_the_third)
    monkeypatch.setattr(steps, "_SAVE_SECONDS", save_seconds)
    stage = {"name": "full", "steps": length, "learning_rate": 1e-3, "full": {"classification": 1}}
    with pytest.raises(RecipeError, match="its weights or their moments are not finite at step 3; lower"):
        train(make_recipe(stages=[stage]), out=tmp_path / "run")
    saved = tmp_path / "run" / "state.pt"
    assert not saved.exists() or torch.load(saved, weights_only=True)["step"] == 2


def test_training_json_holds_what_made_the_encoder_and_nothing_of_the_machine(data, make_recipe, teacher, tmp_path):
    (data / "shapes" / "dark" / "2.png").write_bytes(b"no picture")
    recipe = make_recipe(
        teacher=teacher,
        data=[{"path": str(data / "shapes"), "resolution": 40, "batch": 8}],
        validation={"queries": "shapes-clean"},
    )
    clean = data / "shapes-clean"
    for picture in (data / "shapes").rglob("[345].png"):
        (clean / picture.parent.name).mkdir(parents=True, exist_ok=True)
        (clean / picture.parent.name / picture.name).write_bytes(picture.read_bytes())
    train(recipe, out=tmp_path / "run")
    text = (tmp_path / "run" / "encoder" / "training.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text
    assert record["seed"] == 3
    assert record["recipe"]["stages"][1]["name"] == "nested"
    (one,) = record["data"]
    assert (one["path"], one["pictures"], one["class_names"]) == ("shapes", 11, ["dark", "light"])
    assert len(one["sha256"]) == 64
    assert one["skipped"] == [{"picture": "dark/2.png", "reason": "not a picture in a supported format"}]
    assert record["versions"]["torch"]
    assert "commit" in record
    assert list(record["metrics"]["validation"]) == ["S", "M", "L", "XL", "XL-r16", "S-d1-r16"]
    assert 0 <= record["metrics"]["validation"]["S"]["recall@1"] <= 1
