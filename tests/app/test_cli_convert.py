"""`matvit convert`: every family from a local file, a table of what is lost, and one sentence for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file

from matvit import MatViT, converting

# `matvit convert` takes timm's names alone: sizes are given to timm itself.
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(25):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 32)).save(folder / f"{number}.png")
    Image.open(folder / "7.png").point(lambda value: min(value + 2, 255)).save(folder / "near-copy of 7.png")
    (folder / "bad.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def small_timm(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **(SMALL | options)))


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("vit_small_patch16_224", 32),
        ("deit3_small_patch16_224", 32),
        ("vit_medium_patch16_gap_240", 32),  # without class token
        ("vit_small_patch14_dinov2", 28),
        ("vit_giant_patch14_reg4_dinov2", 28),
        ("vit_small_patch16_dinov3", 32),
        ("vit_small_plus_patch16_dinov3", 32),
        ("vit_base_patch16_siglip_224", 32),
    ],
)
def test_a_local_file_of_every_family_becomes_elastic_and_keeps_its_function(
    run, small_timm, pictures, tmp_path, name, pixels
):
    torch.manual_seed(1)
    vit = timm.create_model(name, num_classes=0).eval()
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    out = tmp_path / "elastic"
    arguments = ["--weights", tmp_path / "weights.safetensors", "--image-size", pixels, "--images", pictures]
    done = run("convert", name, *arguments, "--out", out, "--json")
    assert done.code == 0, done
    model = MatViT.from_pretrained(out)
    assert (model.name, model.space_id) == (name, done.json["space_id"])
    vit.set_input_size(img_size=(pixels, pixels))
    images = torch.randn(2, 3, pixels, pixels)
    with torch.no_grad():
        torch.testing.assert_close(model(images), F.normalize(vit(images), dim=-1), rtol=0, atol=1e-5)
    rows = {row["spec"]: row for row in done.json["submodels"]}
    assert list(rows) == ["S", "M", "L", "XL"]
    assert rows["XL"]["quality"]["agreement@10"] == rows["XL"]["relative_flops"] == 1
    assert [rows[spec]["relative_flops"] for spec in rows] == sorted(rows[spec]["relative_flops"] for spec in rows)
    assert (done.json["pictures"], done.json["held_back"], done.json["near_copies"]) == (20, 5, 1)
    assert [row["path"].endswith("bad.jpg") for row in done.json["skipped"]] == [True]


def test_a_converted_encoder_indexes_searches_and_says_what_it_is(run, small_timm, pictures, photos, tmp_path):
    vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    arguments = ["--weights", tmp_path / "weights.safetensors", "--image-size", 32, "--images", pictures]
    shown = run("convert", "vit_small_patch16_dinov3", *arguments, "--out", tmp_path / "elastic")
    assert "centred cosine" in shown.out
    assert "near-copies of other pictures, left out: 1" in shown.err
    run("index", photos, "--index", tmp_path / "p.index", "--encoder", tmp_path / "elastic")
    query = photos / "cats" / "0.png"
    for spec in ("XL", "M-r16"):
        found = run("search", query, "--index", tmp_path / "p.index", "--encoder", spec, "--json")
        assert found.code == 0, found
    assert run("info", tmp_path / "elastic", "--json").json["submodels"][0]["quality"]["agreement@10"] <= 1


def test_units_are_ordered_on_a_sample_of_the_bundled_photographs(run, small_timm, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "MOST_PICTURES", 30)
    vit = timm.create_model("vit_small_patch16_224", num_classes=7)  # its classifier is left out
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    arguments = ["--weights", tmp_path / "weights.safetensors", "--image-size", 32]
    done = run("convert", "vit_small_patch16_224", *arguments, "--out", tmp_path / "elastic", "--json")
    assert (done.json["pictures"], done.json["held_back"]) == (24, 6)
    ordered = MatViT.from_pretrained(tmp_path / "elastic").vit.blocks[0].mlp.fc1.weight
    assert not torch.equal(ordered, vit.blocks[0].mlp.fc1.weight)
    torch.testing.assert_close(ordered.sum(dim=0), vit.blocks[0].mlp.fc1.weight.sum(dim=0))


def test_names_of_metas_own_files_are_translated(small_timm, tmp_path):
    vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    renamed = {
        name.replace("reg_token", "storage_tokens")
        .replace("gamma_", "ls")
        .replace("ls1", "ls1.gamma")
        .replace("ls2", "ls2.gamma"): tensor
        for name, tensor in vit.state_dict().items()
    }
    save_file(renamed | {"mask_token": torch.zeros(1, 48)}, tmp_path / "meta.safetensors")
    model = MatViT.from_timm("vit_small_patch16_dinov3", weights=tmp_path / "meta.safetensors", image_size=32)
    torch.testing.assert_close(model.vit.reg_token, vit.reg_token)
    torch.testing.assert_close(model.vit.blocks[1].gamma_2, vit.blocks[1].gamma_2)


def test_without_the_hub_its_absence_is_told_and_an_unfit_model_is_refused_before_it_is_asked(
    run, pictures, tmp_path, monkeypatch
):
    create, asked = timm.create_model, []

    def without_network(name, *, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
        return create(name, **(SMALL | options))

    monkeypatch.setattr(timm, "create_model", without_network)
    cases = {
        "'vit_small_patch16_224': its weights cannot be fetched (the hub could not be reached); check the network": [
            "vit_small_patch16_224"
        ],
        "RelPos is neither": ["vit_relpos_small_patch16_224"],
        "use a multiple of 14": ["vit_small_patch14_dinov2", "--image-size", 30],
    }
    for sentence, arguments in cases.items():
        refused = run("convert", *arguments, "--pretrained", "--images", pictures, "--out", tmp_path / "elastic")
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused
        assert sentence in refused.err
    assert asked == ["vit_small_patch16_224"]


def test_what_cannot_be_converted_is_one_sentence(run, small_timm, pictures, tmp_path):
    vit = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "good.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    for name, value in {"nan": float("nan"), "huge": 3e38, "zero": 0.0}.items():
        last = torch.full_like(vit.norm.weight, value)
        changed = {"norm.weight": last, "norm.bias": last.clone()}
        save_file(vit.state_dict() | changed, tmp_path / f"{name}.safetensors")
    good = ["--weights", tmp_path / "good.safetensors", "--image-size", 32]
    huge, zero = (["--weights", tmp_path / f"{name}.safetensors", *good[2:]] for name in ("huge", "zero"))
    cases = {
        "timm cannot create it": ["no_such_model", *good],
        "RelPos is neither": ["vit_relpos_small_patch16_224", *good],
        "give the weights": ["vit_small_patch16_224"],
        "either --weights FILE or --pretrained": ["vit_small_patch16_224", *good, "--pretrained"],
        "does not fit the model ('a'": ["vit_small_patch16_224", "--weights", tmp_path / "other.safetensors"],
        "('blocks.0.ls1.gamma': none in the file, (48,) in the model)": ["vit_small_patch14_dinov2", *good[:2]],
        "cannot be read as safetensors": ["vit_small_patch16_224", "--weights", tmp_path / "damaged.safetensors"],
        "none.safetensors: no such file;": ["vit_small_patch16_224", "--weights", tmp_path / "none.safetensors"],
        "has NaN or infinite values in 'norm.bias'": [
            "vit_small_patch16_224",
            "--weights",
            tmp_path / "nan.safetensors",
        ],
        "submodel 'XL': gives embeddings that": ["vit_small_patch16_224", *huge],
        "not finite or not of unit length": ["vit_small_patch16_224", *zero],
        "'--image-size'": ["vit_small_patch16_224", *good[:2], "--image-size", 10**9],  # in typer's words
        "use a multiple of 16": ["vit_small_patch16_224", *good[:2], "--image-size", 30],
    }
    for sentence, arguments in cases.items():
        images = [] if "--images" in arguments else ["--images", pictures]
        refused = run("convert", *arguments, *images, "--out", tmp_path / "elastic")
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), refused
        assert sentence in refused.err
    assert not (tmp_path / "elastic").exists()
    few = run("convert", "vit_small_patch16_224", *good, "--images", tmp_path, "--out", tmp_path / "elastic")
    assert "0 of 0 pictures can be used, and 20 are needed" in few.err
