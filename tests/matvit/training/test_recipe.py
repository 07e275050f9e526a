"""Recipes: the packaged one keeps its promises, and every mistake is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from matvit.datasets import data_folder, read_dataset
from matvit.errors import DatasetError, RecipeError
from matvit.training.recipe import load_recipe
from matvit_app.cli.main import main

ROOT = Path(__file__).parents[3]
PACKAGED = sorted(path.stem for path in (ROOT / "matvit/training/recipes").glob("*.yaml"))
SHARED_WITH_THE_TESTS = {
    "n07873807",
    "n01770393",
    "n01768244",
    "n04507155",
    "n01983481",
    "n01984695",
    "n03637318",
    "n04328186",
    "n04099969",
    "n07720875",
    "n07734744",
    "n07747607",
    "n07749582",
    "n07753592",
    "n07768694",
}


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_recipes_leave_out_what_the_tests_ask_for(name):
    recipe = load_recipe(name)
    for one in recipe.data:
        place = one.path.partition("/")[0]
        assert place in {"tiny-imagenet", "caltech-101", "clothing-small"}
        assert one.classes == ("0:50" if place == "caltech-101" else None)
        assert set(one.exclude) == (SHARED_WITH_THE_TESTS if place == "tiny-imagenet" else set())
    assert recipe.validation is not None
    assert "grocery" not in recipe.validation.model_dump_json()


def names_of(class_name: str) -> set[str]:
    """Everything that a class is called: "n02509815 lesser panda, red panda", "Mushroom/Brown-Cap-Mushroom"."""
    text = re.sub(r"^n\d+ ", "", class_name).lower().replace("_", " ").replace("-", " ")
    return {part.strip().removesuffix("s") for part in re.split(r"[,/]", text)}


@pytest.mark.parametrize("name", PACKAGED)
def test_no_class_that_is_trained_on_is_a_class_of_the_unseen_tests(name):
    try:
        root = data_folder()
    except DatasetError:
        pytest.skip("needs the public data sets: set MATVIT_DATA")
    data = load_recipe(name).data
    trained = {
        class_name
        for one in data
        for class_name in read_dataset(root / one.path, classes=one.classes, exclude=one.exclude).class_names
    }
    unseen = set(read_dataset(root / "caltech-101/test", classes="50:101").class_names)
    products = set(read_dataset(root / "grocery-store/test").class_names)
    assert len(unseen) == 51
    assert trained > set(read_dataset(root / "caltech-101/test", classes="0:50").class_names)
    assert not {class_name.split(" ")[0] for class_name in trained} & SHARED_WITH_THE_TESTS
    assert not trained & unseen
    called = {class_name: names_of(class_name) for class_name in trained}
    met = {(one, other) for one in called for other in unseen | products if called[one] & names_of(other)}
    red_panda = "n02509815 lesser panda, red panda, panda, bear cat, cat bear, Ailurus fulgens"
    assert met == {(red_panda, "panda")}  # Caltech's is the giant panda: another animal


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sede": 1}, "recipe: unknown field 'sede'; known are name, seed, "),
        ({"optimiser": {"warm": 1}}, "optimiser: unknown field 'warm'; known are betas, "),
        ({"seed": "soon"}, "seed: Input should be a valid integer"),
        ({"seed": 10**30}, "seed: "),
        ({"data": [{"path": "shapes", "batch": 10**12}]}, "data.0.batch: "),
        ({"data": [{"path": "shapes", "batch": 8, "resolution": 10**9}]}, "data.0.resolution: "),
        ({"data": []}, "data: "),
        ({"stages": []}, "stages: "),
        ({"name": "a/b"}, "name: "),
        ({"name": ".."}, "name: "),
        ({"data": [{"path": "", "batch": 8}]}, "data.0.path: "),
        ({"validation": {"queries": ""}}, "validation.queries: "),
        ({"devices": 10**9}, "devices: "),
        ({"optimiser": {"head_rate": 1e300}}, "optimiser.head_rate: Input should be less than or equal to"),
        ({"optimiser": {"weight_decay": 1e300}}, "optimiser.weight_decay: Input should be less than or equal to"),
        ({"encoder": {"timm_model": "x", "image_size": 1000000}}, "encoder.image_size: Input should be less than or"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "betas must be from 0 to below 1"),
    ],
)
def test_a_wrong_field_is_named(make_fields, tmp_path, change, sentence):
    refused_field(tmp_path, make_fields(**change), sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_rate": -1}, "stages.0.learning_rate: Input should be greater than 0"),
        ({"learning_rate": float("inf")}, "stages.0.learning_rate: Input should be a finite number"),
        ({"learning_rate": 1e300}, "stages.0.learning_rate: Input should be less than or equal to"),
        ({"full": {"classification": 1e300}}, "stages.0.full.classification: Input should be less than or equal to"),
        ({"batches": [10**20]}, "stages.0.batches.0: "),
        ({"full": {"teacher_classes": 1}}, "stage 'full' distils a teacher, but the recipe names none"),
        ({"full": {"cosine": 1}}, "stage 'full' aligns to the stage before it, but is the first"),
        ({"full": {}}, "stage 'full' has an encoder without a loss"),
        ({"submodels": {}}, "stage 'full' has an encoder without a loss"),
        (
            {"full": {}, "submodels": {"classification": 1}, "fixed": [], "sampled": 0},
            "stage 'full' has no encoder to train: give it fixed or sampled",
        ),
        ({"augmentation": {"scale": [0, 0]}}, "scale must be two rising shares"),
        ({"augmentation": {"ratio": [2, 1]}}, "ratio must be two rising numbers"),
        ({"name": "nested"}, "two stages have the same name"),
        ({"name": ""}, "stages.0.name: "),
        ({"name": "a\nb"}, "stages.0.name: "),
        ({"name": "a" * 1000}, "stages.0.name: "),
    ],
)
def test_a_wrong_stage_is_named(make_fields, tmp_path, change, sentence):
    fields = make_fields()
    fields["stages"][0] |= change
    refused_field(tmp_path, fields, sentence)


def test_regularisation_that_nested_blocks_lack_is_refused(make_fields, tmp_path):
    fields = make_fields()
    fields["encoder"]["model_args"] |= {"drop_rate": 0, "drop_path_rate": 0.1}
    refused_field(tmp_path, fields, "encoder: nested blocks drop nothing: leave drop_path_rate out of model_args")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"checkpoint_path": "a.pth"},
            "leave checkpoint_path out of model_args: weights are named by the field weights",
        ),
        ({"pretrained": 1}, "leave pretrained out of model_args"),
        ({"embed_dim": 0}, "embed_dim in model_args must be from 1 to 16384, not 0"),
        ({"depth": 99_999_999}, "depth in model_args must be from 1 to 16384, not 99999999"),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "teacher"])
def test_arguments_of_a_timm_model_name_no_weights_and_no_size_of_nothing(
    make_fields, tmp_path, part, arguments, sentence
):
    if part == "teacher" and "checkpoint_path" in arguments:
        arguments = {"checkpoint_path": 1}  # texts are none of a teacher's arguments
    fields = make_fields(teacher={"timm_model": "test_resnet", "image_size": 32, "mean": [0] * 3, "std": [1] * 3})
    fields[part] |= {"model_args": arguments}
    refused_field(tmp_path, fields, f"{part}: {sentence}")


def test_a_key_that_is_given_twice_is_refused(make_fields, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_fields()) + "seed: 9\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not YAML \('seed' is given twice\); correct the file"):
        load_recipe(path)


def test_mixup_with_a_teacher_is_refused(make_fields, tmp_path):
    fields = make_fields(teacher={"timm_model": "test_resnet", "image_size": 32, "mean": [0] * 3, "std": [1] * 3})
    fields["stages"][0] |= {"full": {"teacher_features": 1}, "augmentation": {"mixup_alpha": 0.2}}
    refused_field(tmp_path, fields, "mixup and mosaic need crops that the teacher has not seen")


def refused_field(folder, fields, sentence):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"a: [1", b"!!map [1]", b"\xff\xfe\x00", b"", b"just words", b"- 1"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: "):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "a packaged recipe"),
        ({"seed": "soon"}, "seed"),
        ({"data": [{"path": "gone", "batch": 2}]}, "gone"),
        ({"validation": {"queries": "gone"}}, "gone"),
        ({"encoder": {"timm_model": "vit_unheard_of", "image_size": 32}}, "vit_unheard_of"),
        ({"encoder": {"timm_model": "vit_tiny_patch16_224", "weights": "gone.safetensors", "image_size": 32}}, "gone"),
        ({"encoder": {"timm_model": "vit_tiny_patch16_224", "model_args": {"dept": 1}, "image_size": 32}}, "dept"),
        (
            {"encoder": {"timm_model": "vit_tiny_patch16_224", "model_args": {"weight_init": "bogus"}}},
            "(it refuses one of weight_init, num_classes)",
        ),
        ({"devices": 1000, "data": [{"path": "shapes", "batch": 1000}]}, "1000 devices are more than the"),
    ],
)
def test_the_command_line_says_it_in_one_sentence(data, make_fields, tmp_path, capsys, change, words):
    path = tmp_path / "recipe.yaml"
    if change is not None:
        path.write_text(yaml.safe_dump(make_fields(**change)))
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert words in sentence
    assert "Traceback" not in err


def test_a_name_that_no_file_can_have_is_one_sentence():
    with pytest.raises(RecipeError, match=r"cannot be read \(embedded null byte\); give a recipe file"):
        load_recipe("a\0b")


def test_a_run_that_was_complete_is_told_with_its_checkpoint(data, make_fields, tmp_path, capsys):
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(make_fields()))
    told = f"this run was complete: {out / 'encoder'} is its checkpoint; to train anew, give --fresh or another --out\n"
    for options, complete in (([], False), ([], True), (["--fresh"], False)):
        assert main(["train", str(path), "--out", str(out), *options]) == 0
        assert (told in capsys.readouterr().err) == complete


def test_a_wrong_spec_is_told_before_the_first_step(data, make_fields, tmp_path, capsys):
    fields = make_fields()
    fields["stages"][1]["fixed"] = ["Q"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "'Q' is not a submodel spec" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "text", ["license: 2020-13-45", "seed: " + "9" * 5000, "seed: !!bool foo", "seed: !!timestamp foo", "[" * 5000]
)
def test_what_the_yaml_parser_stumbles_over_is_told_as_not_yaml(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(tmp_path / "r.yaml")
