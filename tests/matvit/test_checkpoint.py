"""Checkpoints: exact round trips, one identity however it is stored, and no silent damage or loss."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from matvit import CheckpointError, MatViT, checkpoint
from matvit.bundled import bundled_folders
from matvit.checkpoint import Storage, forms, reading
from matvit.checkpoint import swap as swap_module
from matvit.model import AxesConfig
from matvit.model_card import model_card, with_table
from matvit.preprocess import Preprocessing

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "checkpoint.md"
FILES = {"config.json", "model.safetensors", "pareto.json", "training.json", "README.md"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint; shared, so tests copy it before they damage it."""
    from timm.models.vision_transformer import VisionTransformer

    folder = tmp_path_factory.mktemp("saved") / "tiny"
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    MatViT.from_timm(vit).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def _refused(source: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        MatViT.from_pretrained(source)
    assert "\n" not in str(caught.value)


# Round trips


def test_float32_round_trip_is_exact(model: MatViT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "tiny")
    loaded = MatViT.from_pretrained(tmp_path / "tiny")
    torch.testing.assert_close(loaded.vit.state_dict(), model.vit.state_dict(), rtol=0, atol=0)
    assert (loaded.config, loaded.shape, loaded.preprocessing) == (model.config, model.shape, model.preprocessing)
    assert loaded.space_id == model.space_id
    assert not loaded.training


def test_the_folder_holds_the_documented_files(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    page = PAGE.read_text()
    config = json.loads((saved / "config.json").read_text())
    fields = [*config, *config["encoder"], *config["axes"], *config["preprocessing"], *config["weights"]]
    fields += forms.ParetoRow.model_fields
    assert [name for name in {*fields, *FILES} if f"`{name}`" not in page] == []


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_space_id_is_what_the_format_page_says(tiny: MatViT, tmp_path: Path, storage: Storage) -> None:
    """Computed from the files alone, as another program would."""
    tiny.save_pretrained(tmp_path / "tiny", storage=storage)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    [added] = re.findall(r"Added so far: (.*?);", page := PAGE.read_text(), re.DOTALL)
    for name in re.findall(r"`(\w+)`", added):  # hashed only off its default
        [default] = re.findall(rf"^\|[^(|]*`{name}`[^(|]*\((.+?)\) \|", page, re.MULTILINE)
        if config["encoder"][name] == json.loads(default):
            del config["encoder"][name]
    stored = load_file(tmp_path / "tiny" / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((".int8", ".scale"))}
    for name in {name.removesuffix(".int8") for name in stored if name.endswith(".int8")}:
        integers, scale = stored[f"{name}.int8"], stored[f"{name}.scale"]
        tensors[name] = integers * scale.reshape(-1, *[1] * (integers.ndim - 1))
    described = {name: config[name] for name in ("encoder", "preprocessing")} | {"version": "space-v1"}
    content = json.dumps(described, sort_keys=True).encode()
    for name in sorted(tensors):
        content += f"{name}:<f4:{tensors[name].shape}".encode() + tensors[name].astype("<f4").tobytes()
    assert config["space_id"] == hashlib.sha256(content).hexdigest()


def test_int8_is_small_and_stable(model: MatViT, tmp_path: Path) -> None:
    """Saved, loaded, saved: the same file and the same space, for ever."""
    model.save_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "first", storage="int8")
    first = MatViT.from_pretrained(tmp_path / "first")
    first.save_pretrained(tmp_path / "second", storage="int8")
    second = MatViT.from_pretrained(tmp_path / "second")
    assert (first.space_id, first.weights_sha256) == (second.space_id, second.weights_sha256)
    assert first.space_id != model.space_id  # rounded weights are another space
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("first", "exact")]
    assert sizes[0] < sizes[1] / 2
    for name, tensor in first.vit.state_dict().items():
        torch.testing.assert_close(tensor, model.vit.state_dict()[name], rtol=0, atol=0.01)


def test_a_loaded_int8_checkpoint_saved_as_float32_keeps_its_space(tiny: MatViT, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "int8", storage="int8")
    rounded = MatViT.from_pretrained(tmp_path / "int8")
    rounded.save_pretrained(tmp_path / "float32")
    exact = MatViT.from_pretrained(tmp_path / "float32")
    assert exact.space_id == rounded.space_id
    assert exact.weights_sha256 != rounded.weights_sha256


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_space_is_the_same_as_a_folder_renamed_copied_or_in_another_place(
    tiny: MatViT, tmp_path: Path, storage: Storage
) -> None:
    tiny.save_pretrained(tmp_path / "a", storage=storage)
    space = MatViT.from_pretrained(tmp_path / "a").space_id
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert MatViT.from_pretrained(tmp_path / "deep" / "b").space_id == space
    assert MatViT.from_pretrained(str(tmp_path / "c")).space_id == space


def test_source_is_the_absolute_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    loaded = MatViT.from_pretrained("copy")
    assert (loaded.source, loaded.revision) == (str(folder.resolve()), None)
    assert loaded.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_bundled_name_is_found_and_stays_the_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: folder.parent)
    assert bundled_folders() == {"copy": folder}
    assert MatViT.from_pretrained("copy").source == "copy"
    monkeypatch.chdir("/")
    _refused(Path("copy"), "no such checkpoint")  # a Path is a folder, never a name


def test_record_and_pareto_rows_come_back(tiny: MatViT, tmp_path: Path) -> None:
    tiny.record = {"recipe": {"seed": 1}, "credits": ["Ünïcode"], "notes": ["a note"], "license": "mit"}
    row = {"name": "S", "spec": "S", "flops": 10, "params": 5, "relative_flops": 0.5, "quality": {"recall@1": 0.9}}
    tiny.pareto = (row | {"latency_ms": {"torch-cpu": 1.5}},)
    tiny.save_pretrained(tmp_path / "tiny")
    loaded = MatViT.from_pretrained(tmp_path / "tiny")
    assert (loaded.record, loaded.pareto) == (tiny.record, tiny.pareto)
    card = (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "| S | 0.00 G | 0.50 | 0.0 M | 90.0 |" in card
    assert "Ünïcode" in card


def test_a_record_keeps_names_that_are_not_utf8(tiny: MatViT, tmp_path: Path) -> None:
    tiny.record = {"data": [{"class_names": [os.fsdecode(b"caf\xe9")]}], "notes": [os.fsdecode(b"\xe9")]}
    tiny.save_pretrained(tmp_path / "x")
    assert MatViT.from_pretrained(tmp_path / "x").record == tiny.record


@pytest.mark.parametrize(("elsewhere", "said"), [({}, True), ({"queries": "others"}, False)])
def test_the_card_says_what_its_percents_are_of_where_it_is_the_same_for_all(
    tiny: MatViT, elsewhere: dict[str, str], said: bool
) -> None:
    measured = {"queries": "asked", "gallery": "searched", "gallery_spec": "XL", "n_queries": 7}
    rows = [checkpoint.pareto_row(tiny, size, {"recall@1": 0.9}) for size in ("S", "XL")]
    tiny.pareto = ({**rows[0], "measured": measured}, {**rows[1], "measured": measured | elsewhere})
    card = model_card(tiny)
    assert ("Percent; 7 queries of asked in searched, embedded once by XL." in card) is said


@pytest.mark.parametrize("before", [(), ("M", "XL")])
def test_a_cards_new_table_is_as_if_the_card_were_written_anew(tiny: MatViT, before: tuple[str, ...]) -> None:
    tiny.pareto = tuple(checkpoint.pareto_row(tiny, size, {"recall@1": 0.5}) for size in before)
    card = model_card(tiny)
    tiny.pareto = (checkpoint.pareto_row(tiny, "S", {"map@r": 0.9}),)
    assert with_table(card.encode(), tiny) == model_card(tiny).encode()
    assert with_table(card.replace("\n", "\r\n").encode(), tiny).count(b"## Submodels") == 1


def test_saving_a_table_leaves_all_else_of_the_folder_as_it_is(folder: Path) -> None:
    """A git clone with a card of the user's own words, in no encoding of ours, is one, too."""
    for name in (".gitattributes", ".git/config", "figure.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    words = b"My own words, caf\xe9.\n"
    card = folder / "README.md"
    card.write_bytes(words + card.read_bytes() + words)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = MatViT.from_pretrained(folder)
    model.pareto = (checkpoint.pareto_row(model, "S", {"recall@1": 0.9}),)
    checkpoint.save_table(model, folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {folder / "pareto.json", card}
    assert MatViT.from_pretrained(folder).pareto == model.pareto
    assert after[card] == words + model_card(model).encode() + words


def test_a_card_without_our_headings_or_none_at_all_stays_so(tiny: MatViT, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    model = MatViT.from_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").write_text("# Mine\n")
    checkpoint.save_table(model, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "README.md").read_text() == "# Mine\n"
    (tmp_path / "tiny" / "README.md").unlink()
    checkpoint.save_table(model, tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "README.md").exists()


def test_a_table_that_cannot_be_saved_leaves_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MatViT.from_pretrained(folder)
    model.pareto = (checkpoint.pareto_row(model, "S", {"recall@1": 0.9}),)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_disk)
        with pytest.raises(CheckpointError, match="cannot be written"):
            checkpoint.save_table(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_table_of_another_encoder_is_not_saved(tiny: MatViT, folder: Path) -> None:
    model = MatViT.from_pretrained(folder)
    tiny.save_pretrained(folder)  # meanwhile
    with pytest.raises(CheckpointError, match="another encoder than the one that was measured"):
        checkpoint.save_table(model, folder)


def test_the_cards_example_runs_beside_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 30), "red").save("picture.jpg")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["embeddings"].shape == (1, 16)


def test_axes_and_whole_number_preprocessing_come_back(plain_vit: Any, tmp_path: Path) -> None:
    axes = AxesConfig(heads=True, keep_order=(0, 3, 1), image_size_step=8)
    model = MatViT(plain_vit, preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)), axes=axes, name="mine")
    model.save_pretrained(tmp_path / "mine")
    loaded = MatViT.from_pretrained(tmp_path / "mine")
    assert (loaded.axes, loaded.name, loaded.space_id) == (axes, "mine", model.space_id)


def test_a_double_precision_model_is_stored_as_float32_under_the_same_space(tiny: MatViT, tmp_path: Path) -> None:
    space = tiny.space_id
    tiny.double().save_pretrained(tmp_path / "tiny")
    loaded = MatViT.from_pretrained(tmp_path / "tiny")
    assert loaded.space_id == space == tiny.space_id
    assert next(loaded.parameters()).dtype == torch.float32


# Damage


def test_every_damaged_byte_of_the_weights_is_caught(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = Path(shutil.copytree(saved, tmp_path_factory.mktemp("flip") / "copy"))
    content = (copy / "model.safetensors").read_bytes()
    config = checkpoint.read_config(copy)

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(position=st.integers(0, len(content) - 1), flip=st.integers(1, 255))
    def flipped(position: int, flip: int) -> None:
        damaged = bytearray(content)
        damaged[position] ^= flip
        (copy / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="sha256"):
            reading.read_tensors(copy, config)

    flipped()


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _other_weights(folder: Path) -> None:
    """A whole, honest file of another model: hash and size are right, tensors are not."""
    content = (folder / "model.safetensors").read_bytes()
    save_file({"norm.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert content != (folder / "model.safetensors").read_bytes()
    _adopt_weights(folder)


def _no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04 a pickle, say")
    _adopt_weights(folder)


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"] * np.nan}, folder / "model.safetensors")
    _adopt_weights(folder)


def _scale_of_another_length(folder: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "norm.weight.int8": np.zeros((4, 2), np.int8),
        "norm.weight.scale": np.zeros(3, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    _adopt_weights(folder)
    _edit_config(folder, lambda raw: raw["weights"].update(storage="int8"))


def _int8_called_float32(folder: Path) -> None:
    MatViT.from_pretrained(folder).save_pretrained(folder, storage="int8")
    _edit_config(folder, lambda raw: raw["weights"].update(storage="float32"))


def _half_precision(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"].astype(np.float16)}, folder / "model.safetensors")
    _adopt_weights(folder)


def _adopt_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _edit_config(folder, lambda raw: raw["weights"].update(found))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _config(*path: str, value: object) -> Callable[[Path], None]:
    def change(raw: dict[str, Any]) -> None:
        functools.reduce(lambda node, key: node[key], path[:-1], raw)[path[-1]] = value

    return lambda folder: _edit_config(folder, change)


PARETO_ROW = '[{"name": "S", "spec": "S", "flops": 1, "params": 1, "relative_flops": 0.5}]'


def _pareto(**change: object) -> Callable[[Path], object]:
    return _write("pareto.json", json.dumps([json.loads(PARETO_ROW)[0] | change]))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (_truncate, "has 1000 bytes"),
    "missing weights": (_remove("model.safetensors"), "model.safetensors: cannot be read"),
    "other weights": (_other_weights, "do not fit"),
    "no safetensors": (_no_safetensors, "not a readable file of float32 safetensors"),
    "weights of NaN": (_not_finite, r"tensor 'norm\.weight' has NaN or infinite values"),
    "scales of another length": (_scale_of_another_length, "not a readable file of int8 safetensors"),
    "missing config": (_remove("config.json"), "holds no config.json"),
    "broken config": (_write("config.json", "{"), "not readable as JSON"),
    "binary config": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00"), "not readable as JSON"),
    "endless config": (_write("config.json", "[" * 100_000), "not readable as JSON"),
    "config of another tool": (_write("config.json", '{"model_type": "vit"}'), "format_version"),
    "config that is a list": (_write("config.json", "[]"), "valid dictionary"),
    "wrong sha": (_config("weights", "sha256", value="0" * 64), "sha256"),
    "newer format": (_config("format_version", value=3), "upgrade matvit-retrieval"),
    "impossible format": (_config("format_version", value=0), "format_version"),
    "unknown field": (_config("surprise", value=1), "surprise"),
    "unknown encoder field": (_config("encoder", "surprise", value=1), "encoder.surprise"),
    "int8 weights called float32": (_int8_called_float32, r"of float32 safetensors \(tensor '.*' is int8\)"),
    "float32 weights called int8": (_config("weights", "storage", value="int8"), "is not int8 with a scale"),
    "half precision": (_half_precision, r"tensor 'norm\.weight' is float16"),
    "unknown weight file": (_config("weights", "file", value="../../etc/passwd"), "weights.file"),
    "control characters in the name": (
        lambda folder: _edit_config(folder, lambda raw: raw.update(name="a\x1b[2J")),
        "field 'name'",
    ),
    "long name": (lambda folder: _edit_config(folder, lambda raw: raw.update(name="a" * 201)), "field 'name'"),
    "negative step": (
        lambda folder: _edit_config(folder, lambda raw: raw["axes"].update(image_size_step=-8)),
        r"field 'axes\.image_size_step'",
    ),
    "missing field": (lambda folder: _edit_config(folder, lambda raw: raw.pop("axes")), "axes"),
    "heads that do not divide": (_config("encoder", "num_heads", value=3), "multiple"),
    "heads of another model": (_config("encoder", "num_heads", value=4), "space_id"),
    "changed mean": (_config("preprocessing", "mean", value=[0.1, 0.2, 0.3]), "space_id"),
    "NaN mean": (_config("preprocessing", "mean", value=[float("nan")] * 3), "preprocessing.mean"),
    "zero std": (_config("preprocessing", "std", value=[0, 1, 1]), "preprocessing.std"),
    "infinite std": (_config("preprocessing", "std", value=[1, 1, float("inf")]), "preprocessing.std"),
    "infinite epsilon": (_config("encoder", "norm_eps", value=float("inf")), "encoder.norm_eps"),
    "another space": (_config("space_id", value="0" * 64), "space_id"),
    "keep order of another model": (_config("axes", "keep_order", value=[0, 7]), "keep_order"),
    "Pareto table of another shape": (_write("pareto.json", '{"S": 1}'), "pareto.json"),
    "Pareto row without flops": (_write("pareto.json", '[{"spec": "S"}]'), "pareto.json"),
    "Pareto row of no submodel": (_pareto(spec="9Q"), r"pareto\.json: row 'S': .*9Q"),
    "Pareto row of NaN": (_pareto(quality={"recall@1": float("nan")}), r"pareto\.json: field '0\.quality\.recall@1'"),
    "Pareto row of text": (_pareto(relative_flops="0.5"), r"pareto\.json: field '0\.relative_flops'"),
    "Pareto row of endless digits": (_pareto(flops=10**400), r"pareto\.json: field '0\.flops'"),
    "notes that are none": (_write("training.json", '{"notes": null}'), r"training\.json: field 'notes'"),
    "credits that are a number": (_write("training.json", '{"credits": 5}'), r"training\.json: field 'credits'"),
    "Pareto row beyond numbers": (_write("pareto.json", PARETO_ROW.replace("0.5", "1e400")), "0.relative_flops"),
    "endless picture": (_config("encoder", "image_size", value=10**12), "encoder.image_size"),
    "endless blocks": (_config("encoder", "ffn_widths", value=[768] * 100_000), "encoder.ffn_widths"),
    "record of another shape": (_write("training.json", "[]"), "training.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_sentence(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    _refused(folder, message)


def test_table_record_and_card_may_be_missing(folder: Path) -> None:
    for name in ("pareto.json", "training.json", "README.md"):
        (folder / name).unlink()
    loaded = MatViT.from_pretrained(folder)
    assert (loaded.pareto, loaded.record) == ((), {})


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    (tmp_path / "file").touch()
    _refused(tmp_path / "missing", "no such checkpoint")
    _refused(str(tmp_path / "file"), "is a file")
    _refused(tmp_path, "holds no config.json")
    _refused("no-such-name", "no such checkpoint")
    _refused("../missing", "no such checkpoint")
    _refused("a/b/c", "no such checkpoint")
    _refused("x" * 5000, "cannot be looked up")
    for source in (None, 5, b"x"):
        _refused(source, "names no checkpoint")


@pytest.mark.parametrize("folder", [None, 5, "a\0b", "\ud800", "x" * 5000])
def test_what_is_no_folders_name_is_saved_nowhere(tiny: MatViT, folder: Any) -> None:
    with pytest.raises(CheckpointError, match=r"names no checkpoint|cannot be looked up"):
        tiny.save_pretrained(folder)


def test_a_save_that_was_killed_between_its_renames_is_told_with_the_way_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(folder.parent.parent)
    relative = f"{folder.parent.name}/{folder.name}"  # which could be a hub's repository, too
    folder.rename(folder.with_name(f".{folder.name}.old-0123abcd"))
    for missing in (relative, folder):
        with pytest.raises(CheckpointError, match="a save was killed") as caught:
            MatViT.from_pretrained(missing)
    subprocess.run(caught.value.fix.removeprefix("move it back: "), shell=True, check=True)
    assert MatViT.from_pretrained(folder).name


def test_a_relative_folder_that_is_missing_is_not_only_called_a_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    _refused("runs/missing", r"runs/missing: is no folder, and cannot be fetched from the hub \(no network\)")


# Saving


def test_nan_and_infinite_weights_are_not_saved(tiny: MatViT, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            tiny.vit.blocks[1].mlp.fc1.weight[3, 4] = value
        for storage in get_args(Storage):
            with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight"):
                checkpoint.save(tiny, tmp_path / "tiny", storage=storage)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_not_finite_are_not_loaded(
    tiny: MatViT, tmp_path: Path, storage: Storage, value: float
) -> None:
    """Another writer's, whose hash is right; 3e38 is a scale whose product with the integers is infinite."""
    tiny.save_pretrained(tmp_path / "tiny", storage=storage)
    weights = tmp_path / "tiny" / "model.safetensors"
    stored = load_file(weights)
    name = "blocks.0.mlp.fc1.weight" + (".scale" if storage == "int8" else "")
    stored[name].flat[0] = value if storage == "int8" or value != 3e38 else float("-inf")
    save_file(stored, weights)
    _adopt_weights(weights.parent)
    _refused(tmp_path / "tiny", r"'blocks\.0\.mlp\.fc1\.weight' has NaN or infinite values")


@pytest.mark.parametrize("scale", [np.ones(1, np.float32), np.ones((64, 1), np.float32), np.ones(64)])
def test_a_scale_is_one_float32_for_each_row(tiny: MatViT, tmp_path: Path, scale: np.ndarray[Any, Any]) -> None:
    tiny.save_pretrained(tmp_path / "tiny", storage="int8")
    weights = tmp_path / "tiny" / "model.safetensors"
    save_file(load_file(weights) | {"blocks.0.mlp.fc1.weight.scale": scale}, weights)
    _adopt_weights(weights.parent)
    _refused(tmp_path / "tiny", "not a float32 for each row")


def test_weights_too_large_to_round_are_not_saved(tiny: MatViT, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny.vit.blocks[0].mlp.fc1.weight[0, 0] = torch.finfo(torch.float32).max
    with np.errstate(over="ignore"), pytest.raises(CheckpointError, match=r"fc1\.weight"):
        tiny.save_pretrained(tmp_path / "tiny", storage="int8")


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"config.json": '{"model_type": "vit"}'}])
def test_a_folder_that_is_no_checkpoint_is_not_replaced(tiny: MatViT, tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="choose a new folder"):
        tiny.save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_a_checkpoint_with_a_users_file_in_it_is_not_replaced(tiny: MatViT, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        tiny.save_pretrained(folder)
    assert MatViT.from_pretrained(folder).space_id != tiny.space_id


def test_links_in_a_loop_are_no_folder_to_save_in(tiny: MatViT, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be looked up"):
        tiny.save_pretrained(tmp_path / "loop")


@pytest.mark.parametrize("name", ["a\nb", "a" * 201])
def test_a_name_that_cannot_be_loaded_is_not_saved(tiny: MatViT, tmp_path: Path, name: str) -> None:
    tiny.name = name
    with pytest.raises(CheckpointError, match="the encoder's name"):
        tiny.save_pretrained(tmp_path / "tiny")


def test_a_folder_below_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be written: '.*notes\.txt' is no folder"):
        checkpoint.refuse_to_replace(tmp_path / "notes.txt" / "a" / "b")


def test_a_checkpoint_in_a_folder_that_may_not_be_written_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != folder.parent)  # modes do not stop root
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.refuse_to_replace(folder)


def test_nothing_is_saved_inside_a_checkpoint(tiny: MatViT, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="lies inside the checkpoint"):
        tiny.save_pretrained(folder / "a" / "b")
    tiny.save_pretrained(folder)


def test_an_unknown_storage_is_one_sentence(tiny: MatViT, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^storage: 'int4' is unknown; give float32 or int8$"):
        tiny.save_pretrained(tmp_path / "tiny", storage="int4")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_replaced(tiny: MatViT, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        tiny.save_pretrained(tmp_path / "file")


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(
    tiny: MatViT, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "empty").mkdir()
    (folder.parent / "link").symlink_to(folder)
    for target in (folder, folder.parent / "empty", folder.parent / "new" / "deep", folder.parent / "link"):
        tiny.save_pretrained(target)
        assert MatViT.from_pretrained(target).space_id == tiny.space_id
    monkeypatch.chdir(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"copy", "empty", "new", "link"}
    assert (folder.parent / "link").is_symlink()


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _fails_at(call: int, original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    calls = iter(range(1, 100))

    def rename(self: Path, target: Path) -> Path:
        if next(calls) == call:
            _full_disk()
        return original(self, target)

    return rename


@pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
def test_a_checkpoint_is_replaced_without_a_moment_that_has_none(
    tiny: MatViT, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed away"))
    tiny.save_pretrained(folder)
    assert MatViT.from_pretrained(folder).space_id == tiny.space_id
    assert [path.name for path in folder.parent.iterdir()] == ["copy"]


def test_what_killed_saves_left_goes_with_the_next_save(tiny: MatViT, folder: Path) -> None:
    users = {"copy", ".copy.old-photos", ".copy2.old-0123abcd", "copy.old-0123abcd"}
    for name in (".copy.old-0123abcd", ".copy.new-0123abcd", *users):
        (folder.parent / name).mkdir(exist_ok=True)
    os.utime(folder.parent / ".copy.new-0123abcd", (0, 0))
    tiny.save_pretrained(folder)
    assert {path.name for path in folder.parent.iterdir()} == users


def test_what_another_process_is_saving_in_the_same_place_is_left_to_it(
    tiny: MatViT, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = swap_module._swap

    def save_another_first(new: Path, target: Path) -> None:
        monkeypatch.setattr(swap_module, "_swap", swap)
        tiny.save_pretrained(folder)
        swap(new, target)

    monkeypatch.setattr(swap_module, "_swap", save_another_first)
    tiny.save_pretrained(folder)
    assert MatViT.from_pretrained(folder).space_id == tiny.space_id


def test_of_two_first_saves_that_meet_the_last_one_stays(
    tiny: MatViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def save_another_first(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        tiny.save_pretrained(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", save_another_first)
    tiny.save_pretrained(tmp_path / "a" / "new")
    assert MatViT.from_pretrained(tmp_path / "a" / "new").space_id == tiny.space_id
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def test_a_place_that_is_taken_again_and_again_is_tried_twice(
    tiny: MatViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Path] = []

    def taken(self: Path, target: Path) -> Path:
        tries.append(target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny.save_pretrained(tmp_path / "new")
    assert tries == [tmp_path / "new"] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system, or a file system, where two folders cannot change names in one step."""
    monkeypatch.setattr(swap_module, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("step", ["fsync", "first rename", "second rename"])
def test_a_failed_save_leaves_the_old_checkpoint(
    tiny: MatViT, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = MatViT.from_pretrained(folder).space_id
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", _full_disk)
        else:
            patch.setattr(Path, "rename", _fails_at(1 if step == "first rename" else 2, Path.rename))
        with pytest.raises(CheckpointError, match="No space left on device"):
            tiny.save_pretrained(folder)
    assert MatViT.from_pretrained(folder).space_id == before
    assert [path.name for path in folder.parent.iterdir()] == ["copy"]


class _KilledError(BaseException):
    """Stands for SIGKILL: no handler of ours runs after it, as `finally` is switched off by the test."""


@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_saving_leaves_the_old_checkpoint_whole(
    tiny: MatViT, folder: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    before = MatViT.from_pretrained(folder).space_id
    calls = iter(range(1, 100))
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise _KilledError
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(_KilledError):
            tiny.save_pretrained(folder)
    # Between the two renames the old checkpoint stands under its dotted name.
    old = folder if call == 1 else next(folder.parent.glob(".copy.old-*"))
    assert MatViT.from_pretrained(old).space_id == before
    for unfinished in folder.parent.glob(".copy.new-*"):
        os.utime(unfinished, (0, 0))  # for an hour it could be another process's
    tiny.save_pretrained(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["copy"]


# The hub, played by a local server


HUB = textwrap.dedent(
    """
    import hashlib, json, sys, threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from pathlib import Path
    from urllib.parse import unquote, urlparse

    ROOT, COMMIT, LOG = Path(sys.argv[1]), "c0ffee" + "0" * 34, []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlparse(self.path).path)
            LOG.append(path)
            if path.startswith("/api/models/owner/tiny/tree/"):
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                         for f in sorted(ROOT.iterdir())]
                self.reply(200, json.dumps(files).encode(), body, {"Content-Type": "application/json"})
            elif path.startswith("/api/models/owner/tiny"):
                files = [{"rfilename": f.name} for f in sorted(ROOT.iterdir())]
                reply = {"id": "owner/tiny", "sha": COMMIT, "private": False, "siblings": files, "tags": [],
                         "downloads": 0, "likes": 0}
                self.reply(200, json.dumps(reply).encode(), body, {"Content-Type": "application/json"})
            elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
                content = (ROOT / Path(path).name).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.reply(200, content, body, headers)
            else:
                self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not Found"})

        def reply(self, status, content, body, headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    import os
    # The hub client reads these when it is imported.
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=sys.argv[2],
                      HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    from matvit import CheckpointError, MatViT

    loaded = MatViT.from_pretrained("owner/tiny")
    pinned = MatViT.from_pretrained("owner/tiny", revision=COMMIT)
    fetched = sorted({Path(path).name for path in LOG if "/resolve/" in path})
    try:
        MatViT.from_pretrained("owner/unknown")
        unknown = "was loaded"
    except CheckpointError as error:
        unknown = str(error)
    server.shutdown()
    server.server_close()
    again = MatViT.from_pretrained("owner/tiny")  # nobody answers any more
    exactly = MatViT.from_pretrained(loaded.source, revision=loaded.revision)
    print(json.dumps({"source": loaded.source, "space_id": loaded.space_id, "again": again.space_id,
                      "pinned": pinned.space_id, "exactly": exactly.space_id,
                      "revisions": [loaded.revision, pinned.revision, again.revision],
                      "fetched": fetched, "unknown": unknown}))
    """
)


def test_a_hub_repository_is_fetched_once_and_then_found_offline(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    run = subprocess.run(
        [sys.executable, "-c", HUB, str(folder), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["source"] == "owner/tiny"
    assert found["revisions"] == ["c0ffee" + "0" * 34] * 3
    space = MatViT.from_pretrained(folder).space_id
    assert found["space_id"] == found["again"] == found["pinned"] == found["exactly"] == space
    assert set(found["fetched"]) == FILES
    assert found["unknown"].startswith("owner/unknown: is no folder, and cannot be fetched from the hub")
    assert "give a local folder" in found["unknown"]
