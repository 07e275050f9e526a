"""Bad input: one sentence on stderr, exit code 2, no traceback, nothing on stdout."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

import retrieval.retriever
from matvit import MatViT
from matvit.errors import CheckpointError
from matvit_app.cli import entry


def refused(outcome, *words):
    """One sentence that holds all `words`."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


@pytest.fixture
def picture(photos):
    return photos / "cats" / "0.png"


@pytest.fixture
def no_picture(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    return path


@pytest.fixture
def damaged_checkpoint(checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_search_with_a_missing_file(run, index, tmp_path):
    refused(run("search", tmp_path / "gone.jpg", "--index", index), "gone.jpg", "no such file")


def test_search_with_a_missing_file_says_so_before_the_encoder_is_loaded(run, index, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval.retriever, "load_encoder", None)  # any use would fail
    refused(run("search", picture, tmp_path / "gone.jpg", "--index", index), "gone.jpg: no such file; name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--where", "label"], ["'label' is no condition", "label=dog", "in quotes"]),
        (["--where", "label==a"], ["'label==a' compares by an unknown sign", "<="]),
        (["--where", "label=>a"], ["'label=>a' compares by an unknown sign"]),
        (["--where", "label!=a"], ["'label!=a' compares by an unknown sign"]),
        (["--where", "price>=3", "--where", "price=4"], ["another condition on 'price'"]),
        (["--where", "lable=dogs"], ["no picture has 'lable'", "label"]),
        (["--item", "10000"], ["no picture with id 10000"]),
    ],
)
def test_search_with_what_cannot_be_meant(run, index, picture, arguments, words):
    images = [picture] if "--where" in arguments else []
    refused(run("search", *images, *arguments, "--index", index), *words)


def test_search_with_a_file_that_is_no_picture(run, index, no_picture):
    refused(run("search", no_picture, "--index", index, "--json"), "notes.txt", "not a picture")


def test_search_with_one_bad_picture_among_good_ones_prints_nothing(run, index, picture, no_picture):
    refused(run("search", picture, no_picture, "--index", index, "--json"), "notes.txt")


def test_search_with_a_folder(run, index, photos):
    refused(run("search", photos, "--index", index), photos, "folder")


@pytest.mark.parametrize(
    "spec", ["Q", "5S", "1S.2XL", "0S.2XL", "S-r84", "S-h1", "XL-d1", "2w129", "2w0", "S,M", "S S"]
)
def test_search_with_a_spec_that_the_encoder_lacks(run, index, picture, spec):
    refused(run("search", picture, "--index", index, "--encoder", spec), "encoder spec", "use S, M, L, XL")


@pytest.mark.parametrize("k", ["0", "-1", "ten"])
def test_search_with_a_wrong_number_of_hits(run, index, picture, k):
    refused(run("search", picture, "--index", index, "-k", k), "-k", "matvit search --help")


def test_search_without_an_index(run, picture, tmp_path):
    refused(run("search", picture, "--index", tmp_path / "gone.index"), "gone.index", "matvit index")


def test_search_in_a_folder_that_is_no_index(run, picture, photos):
    refused(run("search", picture, "--index", photos), photos, "no index")


def test_a_working_directory_that_is_gone_is_told(run, index, tmp_path, monkeypatch, capfd):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert entry.main() == 2
    assert capfd.readouterr().err == "error: the working directory is not there any more; cd to one that is\n"
    with pytest.raises(retrieval.IndexFormatError, match="working directory is not there any more; give an absolute"):
        retrieval.Index.open("i")


def test_what_is_given_twice_or_not_at_all_is_told(run, index, picture):
    refused(run("delete", "--index", index), "there is nothing to delete", "--item")
    refused(run("duplicates", index, "--exact", "--min-score", 0.9), "--exact and --min-score are both given")
    refused(run("search", picture, index), f"{index}: is an index; give it as --index {index}")


def test_delete_names_what_the_index_does_not_hold_and_takes_nothing_out(run, index, picture, photos):
    missing = [photos / f"none-{number}.png" for number in range(7)]
    refused(run("delete", picture, *missing[:2], "--index", index), *missing[:2], "nothing was deleted")
    refused(run("delete", *missing, "--index", index), *missing[:5], "nor 2 more of these")
    assert run("info", index, "--json").json["items"] == 8


def test_search_when_the_checkpoint_of_the_index_is_gone(run, photos, checkpoint, picture, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    assert run("index", photos, "--index", tmp_path / "a.index", "--encoder", moved).code == 0
    shutil.rmtree(moved)
    refused(run("search", picture, "--index", tmp_path / "a.index"), "a.index", moved)


def test_search_when_another_encoder_took_its_place(run, photos, checkpoint, other_checkpoint, picture, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(checkpoint, place)
    assert run("index", photos, "--index", tmp_path / "a.index", "--encoder", place).code == 0
    shutil.rmtree(place)
    shutil.copytree(other_checkpoint, place)
    spaces = [json.loads((folder / "config.json").read_text())["space_id"][:8] for folder in (checkpoint, place)]
    refused(run("search", picture, "--index", tmp_path / "a.index"), *spaces)


def test_index_with_another_encoder(run, index, photos, other_checkpoint):
    refused(run("index", photos, "--index", index, "--encoder", other_checkpoint), "embedding space", index)


@pytest.mark.parametrize("command", ["index", "info", "extract", "eval"])
def test_a_checkpoint_with_a_wrong_hash(run, command, damaged_checkpoint, photos, tmp_path):
    arguments = {
        "index": [photos, "--index", tmp_path / "new.index", "--encoder", damaged_checkpoint],
        "info": [damaged_checkpoint],
        "extract": [damaged_checkpoint, "--spec", "S", "--out", tmp_path / "s.safetensors"],
        "eval": [photos, "--encoder", damaged_checkpoint],
    }
    refused(run(command, *arguments[command]), "model.safetensors", "sha256")
    assert not (tmp_path / "new.index").exists()


@pytest.mark.parametrize("command", ["index", "info", "extract", "eval", "verify"])
def test_an_unknown_checkpoint(run, command, photos, tmp_path):
    arguments = {
        "index": [photos, "--index", tmp_path / "new.index", "--encoder", "no-such"],
        "info": ["no-such"],
        "extract": ["no-such", "--spec", "S", "--out", tmp_path / "s.safetensors"],
        "eval": [photos, "--encoder", "no-such"],
        "verify": ["no-such"],
    }
    refused(run(command, *arguments[command]), "no-such: no such checkpoint")


def test_index_a_missing_folder(run, checkpoint, tmp_path):
    made = tmp_path / "new.index"
    refused(run("index", tmp_path / "gone", "--index", made, "--encoder", checkpoint), "gone", "no such")
    assert not made.exists()


def test_index_an_empty_folder(run, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    made = tmp_path / "new.index"
    refused(run("index", tmp_path / "empty", "--index", made, "--encoder", checkpoint), "empty", "no pictures")
    assert not made.exists()


def test_index_nothing_but_a_file_that_is_no_picture(run, checkpoint, no_picture, tmp_path):
    made = tmp_path / "new.index"
    refused(run("index", no_picture, "--index", made, "--encoder", checkpoint), "notes.txt", "names no picture")
    assert not made.exists()


def test_index_where_something_else_is(run, photos, checkpoint, no_picture):
    refused(run("index", photos, "--index", no_picture, "--encoder", checkpoint), "notes.txt")
    assert no_picture.read_text() == "no picture"


@pytest.mark.parametrize("target", ["folder", "file"])
def test_info_and_verify_of_something_else(run, photos, no_picture, target):
    path = {"folder": photos, "file": no_picture}[target]
    refused(run("info", path), path, "neither a checkpoint nor an index")
    refused(run("verify", path), path, "neither a checkpoint nor an index")


def test_extract_to_a_name_of_another_kind(run, checkpoint, tmp_path):
    refused(run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "s.pt"), ".safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.safetensors", "new/s.safetensors"])
def test_extract_into_a_checkpoints_folder(run, checkpoint, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    refused(run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "copy" / name), "inside the checkpoint")
    assert {path: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == before


@pytest.mark.parametrize("content", ['{"format": "other"}', "[]", "my notes"])
def test_extract_beside_a_json_file_of_the_users(run, checkpoint, tmp_path, content):
    (tmp_path / "notes.json").write_text(content)
    refused(run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "notes.safetensors"), "notes.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.json", content)]


def test_what_a_killed_extract_left_goes_with_the_next(run, checkpoint, tmp_path):
    for name in (".tmp-12-s.json", ".tmp-12-s.safetensors", ".tmp-12-other-s.json", ".tmp-s.json"):
        (tmp_path / name).write_text("half")
    assert run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "s.safetensors").code == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".tmp-12-other-s.json", ".tmp-s.json", "s.json", "s.safetensors"}


@pytest.mark.parametrize("name", ["small.safetensors", "folder/small.safetensors"])
def test_extract_below_a_file(run, checkpoint, tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    outcome = run("extract", checkpoint, "--spec", "S", "--out", tmp_path / "notes.txt" / name)
    refused(outcome, f"small.safetensors: cannot be written: '{tmp_path}/notes.txt' is no folder")


def test_extract_with_a_wrong_spec(run, checkpoint, tmp_path):
    refused(run("extract", checkpoint, "--spec", "Q", "--out", tmp_path / "q.safetensors"), "'Q'")
    assert list(tmp_path.iterdir()) == []


def test_what_an_error_quotes_is_cut_and_holds_no_control_characters(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["axes"]["keep_order"] = list(range(20_000))
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (
        ["extract", checkpoint, "--spec", "S\x1b[31m" * 9_000, "--out", tmp_path / "s.safetensors"],
        ["extract", folder, "--spec", "S", "--out", tmp_path / "s.safetensors"],
        ["eval", "a" * 90_000],
        ["eval", tmp_path, "--recall-at", "a" * 90_000],
        ["info", "a\x1b\nb" * 5_000],
    ):
        done = run(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert len(done.err) < 2_000
    with pytest.raises(CheckpointError) as caught:
        MatViT.from_pretrained(tmp_path / "a\x1b[31m\nb")
    assert str(caught.value).isprintable()


def test_train_into_a_checkpoints_folder(run, checkpoint, photos, tmp_path):
    recipe = f"{{name: a, encoder: {{checkpoint: {checkpoint}}}, data: [{{path: {photos}, batch: 2}}], stages: [{{"
    recipe += "name: b, steps: 1, learning_rate: 1, full: {classification: 1}}]}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    before = sorted(checkpoint.iterdir())
    refused(run("train", tmp_path / "recipe.yaml", "--out", checkpoint), f"inside the checkpoint '{checkpoint}'")
    assert sorted(checkpoint.iterdir()) == before


def test_eval_of_a_missing_data_set(run, checkpoint, tmp_path):
    refused(run("eval", tmp_path / "gone", "--encoder", checkpoint), "gone", "no such data set")


def test_eval_finds_a_data_set_below_the_data_folder(run, checkpoint, photos, monkeypatch):
    name = f"{photos.name}"
    monkeypatch.chdir(photos.parents[1])
    refused(run("eval", name, "--encoder", checkpoint), name, "MATVIT_DATA")
    monkeypatch.setenv("MATVIT_DATA", str(photos.parent))
    assert run("eval", name, "--encoder", checkpoint, "--queries", "S").code == 0


def test_a_checkpoint_as_the_submodel_asks_whether_the_checkpoint_was_meant(run, checkpoint, tmp_path):
    for name in ("matvit-small", checkpoint):
        refused(run("search", tmp_path / "a.jpg", "--encoder", name), f"did you mean --checkpoint {name}?")


def test_eval_of_classes_that_are_not_there(run, checkpoint, photos):
    refused(run("eval", photos, "--encoder", checkpoint, "--classes", "50:101"), "50:101")


@pytest.mark.parametrize("option", ["--queries", "--galleries"])
@pytest.mark.parametrize("specs", ["S,Q", ","])
def test_eval_with_a_wrong_spec(run, checkpoint, photos, option, specs):
    refused(run("eval", photos, "--encoder", checkpoint, option, specs), "spec")


def test_train_with_a_missing_recipe(run, tmp_path):
    refused(run("train", tmp_path / "gone.yaml", "--out", tmp_path / "run"), "gone.yaml")


def test_train_with_a_recipe_that_is_none(run, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nsteps: many\n")
    refused(run("train", tmp_path / "bad.yaml", "--out", tmp_path / "run"), "bad.yaml")


def test_app_on_a_port_that_is_taken(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run("app", "--port", port, "--no-browser"), f"127.0.0.1:{port}", "--port")


# Not a name, too long for one, and an address of documentation, which no machine has (RFC 5737).
@pytest.mark.parametrize("host", ["not a host", "x" * 300, "192.0.2.1"])
@pytest.mark.parametrize("command", ["app", "demo"])
def test_app_at_an_address_that_is_not_this_machines(run, command, host):
    refused(run(command, "--host", host, "--no-browser"), f"{host}:8501", "address of this machine", "--host 127.0.0.1")


def test_app_on_an_index_that_is_none(run, photos):
    refused(run("app", photos, "--port", _free_port(), "--no-browser"), photos, "no index")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seek"], ["seek"]),
        (["search"], ["nothing to search with", "name pictures"]),
        (["search", "a.jpg", "--fast"], ["--fast"]),
        (["extract", "tiny"], ["--spec"]),
        (["app", "--port", "70000"], ["--port"]),
    ],
)
def test_usage_errors_name_the_argument_and_the_help(run, arguments, words):
    refused(run(*arguments), *words, "--help")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["index", ""], "IMAGES"),
        (["index", "{photos}", ""], "IMAGES"),
        (["index", "{photos}", "--index", ""], "--index"),
        (["index", "{photos}", "--index="], "--index"),
        (["index", "{photos}", "--encoder", ""], "--encoder"),
        (["search", ""], "IMAGES"),
        (["search", "{photos}/cats/0.png", "--index", ""], "--index"),
        (["search", "{photos}/cats/0.png", "--encoder", ""], "--encoder"),
        (["info", ""], "INDEX"),
        (["train", "", "--out", "run"], "RECIPE"),
        (["train", "matvit-small", "--out", ""], "--out"),
        (["extract", "", "--spec", "S", "--out", "s.safetensors"], "checkpoint"),
        (["extract", "matvit-small", "--spec", "S", "--out", ""], "--out"),
        (["eval", ""], "dataset"),
        (["eval", "{photos}", "--gallery", ""], "--gallery"),
        (["eval", "{photos}", "--queries", ""], "--queries"),
        (["app", ""], "index"),
        (["app", "--host", ""], "--host"),
        (["demo", "--host", ""], "--host"),
        (["verify", ""], "INDEX"),
        (["delete", ""], "PATHS"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(run, photos, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    refused(run(*(argument.format(photos=photos) for argument in arguments)), name, "it is empty", "--help")
    assert list(tmp_path.iterdir()) == []


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
