"""`matvit adapt`: a checkpoint of the same space, a table, and nothing written where nothing is gained."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from matvit import MatViT, adapting
from matvit.model import AxesConfig
from matvit_app import services


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((28, 28)).save(
            folder / f"{number}.png"
        )
    (folder / "bad.jpg").write_bytes(b"no picture")
    shutil.copy(folder / "7.png", folder / "burst.png")
    return folder


def test_adapting_keeps_the_space_and_records_what_was_gained(run, checkpoint, many, tmp_path):
    out = tmp_path / "adapted"
    done = run("adapt", checkpoint, "--images", many, "--out", out, "--json")
    assert done.code == 0, done
    old, new = MatViT.from_pretrained(checkpoint), MatViT.from_pretrained(out)
    assert new.space_id == old.space_id
    assert new.weights_sha256 != old.weights_sha256
    assert (done.json["pictures"], done.json["near_copies"]) == (60, 1)
    assert new.record["adapted"]["kept"] == done.json["kept"] != []
    for name in done.json["kept"]:
        assert done.json["after"][name]["agreement@10"] > done.json["before"][name]["agreement@10"]
        assert 0 < done.json["interval"][name][0] < done.json["interval"][name][1]
    assert [row["path"].endswith("bad.jpg") for row in done.json["skipped"]] == [True]
    assert "bad.jpg" in done.err
    assert "near-copies of other pictures, left out: 1" in done.err


def test_recall_by_folder_is_shown_where_there_are_folders(run, checkpoint, many, tmp_path):
    for number, picture in enumerate(sorted(many.glob("*.png"))):
        folder = tmp_path / "photos" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder)
    shown = run("adapt", checkpoint, "--images", tmp_path / "photos", "--out", tmp_path / "adapted")
    assert "recall@1 by folder" in shown.out
    assert 0 <= MatViT.from_pretrained(tmp_path / "adapted").record["adapted"]["after"]["S"]["recall@1"] <= 1
    assert "recall@1" not in run("adapt", checkpoint, "--images", many, "--out", tmp_path / "other").out


def test_the_adapted_checkpoint_searches_the_index_of_the_old_one(
    run, checkpoint, other_checkpoint, many, index, photos, tmp_path
):
    assert run("adapt", checkpoint, "--images", many, "--out", tmp_path / "adapted").code == 0
    query = ("search", photos / "cats" / "0.png", "--index", index, "--json")

    def scores(*options):
        found = run(*query, *options)
        assert found.code == 0, found
        return [hit["score"] for hit in found.json["queries"][0]["hits"]]

    adapted = ("--checkpoint", tmp_path / "adapted")
    assert scores(*adapted) == scores()  # XL
    assert scores("--encoder", "S", *adapted) != scores("--encoder", "S")
    refused = run(*query, "--checkpoint", other_checkpoint)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "embedding space" in refused.err


def test_nothing_gained_is_bad_news_and_writes_nothing(run, checkpoint, many, tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, "fit_last_block", lambda *_: {})
    done = run("adapt", checkpoint, "--images", many, "--out", tmp_path / "adapted")
    assert done.code == 1
    assert "nothing was surely gained" in done.err
    assert "as before" in done.out
    assert not (tmp_path / "adapted").exists()


def test_ctrl_c_leaves_the_old_checkpoint_whole(run, checkpoint, many, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    old = tmp_path / "mine"
    MatViT.from_pretrained(checkpoint).save_pretrained(old)
    before = (old / "model.safetensors").read_bytes()
    monkeypatch.setattr(adapting, "fit_last_block", interrupted)
    assert run("adapt", old, "--images", many, "--out", old).code == 130
    assert (old / "model.safetensors").read_bytes() == before
    assert services.verify(str(old)).problems == ()


def test_measures_of_submodels_that_changed_leave_the_table(run, checkpoint, many, tmp_path):
    model = MatViT.from_pretrained(checkpoint)
    cost = {"flops": 1, "params": 1, "relative_flops": 1.0, "quality": {"recall@1": 0.5}}
    model.pareto = tuple({"name": spec, "spec": spec, **cost} for spec in ("S", "XL"))
    model.save_pretrained(tmp_path / "old")
    assert run("adapt", tmp_path / "old", "--images", many, "--out", tmp_path / "new").code == 0
    rows = json.loads((tmp_path / "new" / "pareto.json").read_text())
    assert {row["spec"]: row["quality"] for row in rows} == {"S": {}, "XL": {"recall@1": 0.5}}


def test_measures_stay_where_the_last_block_is_as_before(checkpoint):
    model = MatViT.from_pretrained(checkpoint)  # two blocks
    model.open_axes(AxesConfig(keep_order=(0, 1)))

    def left(spec):
        row = {"spec": spec, "quality": {"recall@1": 0.5}, "measured": {"n_queries": 1}}
        kept = services._without_stale_quality(model, row, ("S", "L"))
        assert ("measured" in kept) == bool(kept["quality"])
        return bool(kept["quality"])

    specs = ("S", "M", "L", "XL", "1XL.1S", "1S.1XL", "S-d1")
    assert {spec for spec in specs if left(spec)} == {"M", "XL", "1S.1XL", "S-d1"}


@pytest.mark.parametrize(
    ("images", "out", "words"),
    [
        ("photos", "new", "8 of 8 pictures can be used, and 40 are needed"),
        ("one", "new", "1 of 1 pictures can be used, and 40 are needed"),
        ("gone", "new", "No such file or directory"),
        ("many", "foreign", "which is no part of a checkpoint"),
    ],
)
def test_bad_input_is_one_sentence(run, checkpoint, photos, many, tmp_path, images, out, words):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    folder = {"photos": photos, "one": photos / "cats" / "0.png", "many": many, "gone": tmp_path / "gone"}[images]
    done = run("adapt", checkpoint, "--images", folder, "--out", tmp_path / out)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    assert words in done.err
