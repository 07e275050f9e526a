"""The benchmarks that train run, and compare what they say they compare: tiny, on the CPU."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from matvit import MatViT
from matvit.datasets import read_dataset
from matvit.errors import DatasetError
from matvit.evaluation import cross_test
from matvit.training.loop import train
from matvit.training.recipe import TeacherRecipe
from matvit.training.stages import check_specs

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark: they stand beside each other in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def controls(load, data, monkeypatch):
    """Look-alikes of the public sets: two classes are queries and gallery, seen and unseen, and one query is a copy."""
    module = load("controls")
    for place, numbers in {
        "caltech-101/test": (0, 1, 2),
        "caltech-101/train": (3, 4, 5),
        "grocery-store/test": (0, 1),
        "grocery-store/train": (2, 3),
        "grocery-store/iconic": (5,),
    }.items():
        for name in ("dark", "light"):
            (data / place / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(data / "shapes" / name / f"{number}.png", data / place / name / f"{number}.png")
    shutil.copy(data / "caltech-101/train/dark/3.png", data / "caltech-101/test/dark/0.png")
    (data / "grocery-store/test/odd").mkdir()
    shutil.copy(data / "shapes/dark/4.png", data / "grocery-store/test/odd/0.png")
    tasks = {name: (queries, gallery, None) for name, (queries, gallery, _) in module.TASKS.items()}
    for name, value in {
        "TASKS": tasks,
        "SEEN": ("caltech-101/train", "0:2"),
        "DIAL": ("XL", "XL-r16"),
        "DROPPED": ("XL-d1",),
        "PREFIXES": (8, 32),
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_controls_train_the_first_stage_once_and_ask_each_rival_in_the_gallery_it_was_made_for(
    controls, make_recipe, tmp_path, monkeypatch, capsys
):
    trained: list[tuple[str, list[tuple[str, int]]]] = []
    galleries: list[tuple[str, MatViT]] = []
    across = controls.across

    def note(recipe, *, out):
        trained.append((out.name, [(stage.name, stage.steps) for stage in recipe.stages]))
        return train(recipe, out=out)

    def look(small, spec, big, tasks):
        galleries.append((spec, big))
        return across(small, spec, big, tasks)

    recipe = make_recipe()
    nested = train(recipe, out=tmp_path / "nested")
    monkeypatch.setattr(controls, "train", note)
    monkeypatch.setattr(controls, "across", look)
    found = controls.measure(recipe, encoder=str(nested.source), out=tmp_path, steps=2, alone=3, longer=5)
    assert trained == [
        ("plain", [("full", 4)]),
        ("distilled", [("nested", 2)]),
        ("independent", [("full", 3)]),
        ("longer", [("full", 5)]),
    ]
    assert sorted((spec, big.space_id == nested.space_id) for spec, big in galleries) == [
        ("S", False),
        ("S", True),
        ("XL", True),
    ]
    anchor = torch.load(tmp_path / "distilled" / "state.pt", weights_only=True)["anchor"]
    (never,) = (big for _, big in galleries if big.space_id != nested.space_id)
    assert all(torch.equal(tensor, anchor[name]) for name, tensor in never.vit.state_dict().items())
    assert set(found["seconds"]) == {"plain", "distilled", "independent", "longer"}
    tables = found["tables"]
    assert tables["nested"]["S"] == tables["small encoders: nested"]["in the big gallery"]
    assert list(tables["never nested"]) == list(tables["never nested, longer"]) == ["XL", "XL-r16", "XL-d1"]
    # All of an embedding's numbers find what it finds.
    assert tables["nested, by the first 32 numbers"]["S"]["groceries"]["nested finds more"] == [0, 0, 0]
    controls.show(found)
    printed = capsys.readouterr().out.splitlines()
    assert f"| small encoders: distilled | {' | '.join(controls.TASKS)} |" in printed


def test_controls_say_how_many_points_more_the_nested_encoder_finds_over_the_same_queries(controls):
    ours, theirs = np.arange(1000) < 500, np.arange(1000) < 480
    (cells,) = controls.rows({"S": {"Caltech": theirs}}, {"S": {"Caltech": ours}}).values()
    more, low, high = cells["Caltech"]["nested finds more"]
    assert (cells["Caltech"]["recall@1"], more) == (48.0, 2.0)
    assert 1.0 < low < 1.5  # unpaired: below -2
    assert 2.5 < high < 3.1


def test_controls_ask_what_matvit_eval_asks(controls, tiny, data):
    """A query whose copy is in the gallery is left out, and one without its class."""
    tasks = controls.read_tasks()
    assert tasks["Caltech"].rows.tolist() == [1, 2, 3, 4, 5]
    assert tasks["groceries"].rows.tolist() == [0, 1, 2, 3]
    found = controls.found_by(tiny, ["XL", "S"], tasks)
    for name, (queries, gallery, _) in controls.TASKS.items():
        sets = (controls.read_pictures(queries), controls.read_pictures(gallery))
        result = cross_test(tiny, *sets, query_specs=["XL", "S"], gallery_specs=["XL"])
        for spec in ("XL", "S"):
            quality = result.matrix[spec]["XL"]
            assert quality.n_queries == len(tasks[name].rows)
            assert quality["recall@1"] == pytest.approx(found[spec][name].mean())


def test_every_variant_that_was_compared_is_a_recipe_for_the_encoder_that_it_starts_from(load, tmp_path):
    compared = load("compared")
    bundled = MatViT.from_pretrained("matvit-small")
    bundled.private = None
    for name, variant in compared.VARIANTS.items():
        recipe = compared.recipe_of(variant, out=tmp_path)
        check_specs(bundled, recipe)
        assert [stage.name for stage in recipe.stages] == [
            compared.load_recipe(variant.recipe).stages[index].name for index in variant.stages
        ]
        assert variant.after is None or recipe.encoder.checkpoint == str(tmp_path / "plain-ordered"), name


def test_a_variant_goes_on_from_the_plain_run_and_has_its_row(load, controls, make_recipe, tmp_path, monkeypatch):
    compared = load("compared")
    change = {"steps": 2, "learning_rate": 1e-3}
    variants = {"plain": compared.Variant(stages=(0,)), "nested": compared.VARIANTS["centred"]}
    variants["nested"] = replace(variants["nested"], change=variants["nested"].change | change)
    monkeypatch.setattr(compared, "VARIANTS", variants)
    monkeypatch.setattr(compared, "DIAL", ("XL", "XL-r16"))
    monkeypatch.setattr(compared, "load_recipe", lambda _: make_recipe())
    found = compared.row("nested", out=tmp_path, tasks=controls.read_tasks())
    assert len(found) == 2 + 2 + 3
    assert found[0] == "nested"
    assert all(0 <= float(figure) <= 100 for cell in found[2:] for figure in cell.split(" / "))
    record = MatViT.from_pretrained(tmp_path / "nested" / "encoder").record
    (stage,) = record["recipe"]["stages"]
    assert (stage["name"], stage["steps"], stage["submodels"]["centred"]) == ("nested", 2, True)
    assert record["before"]["recipe"]["stages"][0]["name"] == "full"
    assert compared.row("plain", out=tmp_path, tasks=controls.read_tasks())[-3:] == ["", "", ""]


def test_a_picture_that_cannot_be_read_does_not_shift_the_labels_of_the_others(controls, data, tiny):
    (data / "shapes" / "dark" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"shapes: 1 pictures cannot be read .*0\.png: not a picture"):
        controls.embed(tiny, "S", read_dataset(data / "shapes"))


def test_the_paper_at_small_scale_has_a_row_for_each_granularity(load, data, tmp_path, monkeypatch):
    matformer = load("matformer")
    shutil.copytree(data / "shapes", data / "tiny-imagenet" / "train")
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(matformer, "SIZES", small)
    pictures = matformer.read_dataset(data / "shapes")
    rows = matformer.measure(tmp_path, steps=1, batch=4, pictures=pictures)
    assert [row["encoder"] for row in rows] == ["S", "M", "L", "XL"]
    assert rows[-1]["flops"] == 1
    assert rows[-1]["nested same class as XL"] == rows[-1]["alone same class as XL"] == 100
    assert all(0 <= value <= 100 for row in rows for value in row.values() if not isinstance(value, str))


def test_a_profile_of_training_steps_leaves_out_what_comes_before_the_first(load, make_recipe, monkeypatch):
    training_step = load("training_step")
    profiled: list[bool] = []
    begin = training_step.loop.begin_stage

    def note(run, stage):
        profiled.append(torch.autograd._profiler_enabled())
        begin(run, stage)

    monkeypatch.setattr(training_step.loop, "begin_stage", note)
    found = training_step.measure(make_recipe(), "nested", steps=2)
    assert profiled == [False]
    assert found["stage"] == "nested"
    assert found["pictures_per_second"] > 0
    assert found["device_time"] == {}  # on a CPU


def test_a_profile_sums_the_devices_kernels_without_the_profilers_table(load):
    training_step = load("training_step")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.randn(4, 4) @ torch.randn(4, 4)
    recorded = profiled.profiler.kineto_results.events()
    assert recorded
    assert not any(training_step.kernels(recorded).values())  # none of these ran on a device

    def kernel(name: str, milliseconds: int, device: DeviceType = DeviceType.CUDA, *, annotation: bool = False):
        event = Mock()
        event.name.return_value, event.duration_ns.return_value = name, milliseconds * 1_000_000
        event.device_type.return_value, event.is_user_annotation.return_value = device, annotation
        return event

    found = training_step.kernels(
        [
            kernel("sm90_xmma_gemm_bf16", 3),
            kernel("nvjet_hsh_128x256", 2),
            kernel("pytorch_flash::flash_fwd_kernel", 4),
            kernel("vectorized_layer_norm_kernel", 5),
            kernel("aten::mm", 100, device=DeviceType.CPU),
            kernel("ProfilerStep", 100, annotation=True),
        ]
    )
    assert {kind: time for kind, time in found.items() if time} == {
        "attention": 4,
        "matrix products": 5,
        training_step.REST: 5,
    }
    assert profiled.profiler._function_events is None


def test_the_teacher_is_measured_at_its_own_resolution_in_its_own_gallery(load, data, tiny, tmp_path, monkeypatch):
    teacher = load("teacher")
    monkeypatch.setattr(teacher, "SETS", (("shapes", "shapes", None),))
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "teacher.safetensors")
    recipe = TeacherRecipe(
        timm_model="test_resnet",
        weights=tmp_path / "teacher.safetensors",
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    asked: list[int] = []
    at = teacher.teacher_at(recipe, 40, shape=tiny.shape, device=torch.device("cpu"))
    at.encoding.module.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape[-1]))
    monkeypatch.setattr(teacher, "cross_test", partial(cross_test, drop_near_copies=False))
    (row,) = teacher.found(at)
    assert set(asked) == {40}
    assert row["recall@1"] == 100  # every query is in the gallery, too
