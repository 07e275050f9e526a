"""What the commands print and write: shapes of `--json`, tables, exit codes 0 and 1."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch.nn.functional import normalize

from matvit import CheckpointError, MatViT
from matvit.extracted import read_extracted
from matvit_app import services
from matvit_app.cli.index import described
from retrieval import Index, IndexWarning
from retrieval.backends.cache import open_search


@pytest.fixture
def own_index(run, photos, checkpoint, tmp_path):
    """An index and pictures that the test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    assert run("index", tmp_path / "photos", "--index", tmp_path / "own.index", "--encoder", checkpoint).code == 0
    return tmp_path / "own.index"


# --- index ---------------------------------------------------------------------------------------


def test_index_reports_what_it_did(run, photos, checkpoint, tmp_path):
    done = run("index", photos, "--index", tmp_path / "new.index", "--encoder", checkpoint, "--json")
    assert (done.code, done.err) == (0, "")
    report = ["indexed", "unchanged", "deleted", "gone", "skipped", "images_per_second", "seconds"]
    assert list(done.json) == [*report, "index_type", "index_reason", "index_parameters", "recall_at_10"]
    assert (done.json["indexed"], done.json["unchanged"], done.json["skipped"]) == (8, 0, [])


def test_index_again_adds_and_forgets(run, own_index):
    pictures = own_index.parent / "photos"
    (pictures / "cats" / "0.png").rename(pictures / "dogs" / "new.png")
    kept = run("index", pictures, "--index", own_index, "--json").json
    assert (kept["indexed"], kept["unchanged"], kept["deleted"], kept["gone"]) == (1, 7, 0, 1)
    shown = run("index", pictures, "--index", own_index)
    assert "1 file of the index is gone; --delete forgets it" in shown.err
    assert "pictures/s" not in shown.out  # nothing was new
    pruned = run("index", pictures, "--index", own_index, "--delete", "--json").json
    assert (pruned["indexed"], pruned["unchanged"], pruned["deleted"], pruned["gone"]) == (0, 8, 1, 0)


@pytest.mark.parametrize("emptied", [False, True])
def test_delete_of_a_folder_whose_disk_may_be_away_is_told_and_exits_with_1(run, own_index, emptied):
    pictures = own_index.parent / "photos"
    (pictures / "cats").rename(own_index.parent / "away")
    if emptied:
        (pictures / "cats").mkdir()
    done = run("index", pictures / "cats", pictures / "dogs", "--index", own_index, "--delete")
    assert done.code == 1
    assert " 0 deleted" in done.out
    assert "gone, and stay there; if no disk is away, matvit delete PATH --index" in done.err
    assert f"{pictures / 'cats'}: nothing of it is there" in done.err
    assert run("delete", pictures / "cats", "--index", own_index).code == 0


def test_delete_takes_pictures_and_folders_out_and_leaves_their_files(run, own_index, monkeypatch):
    monkeypatch.chdir(own_index.parent)
    shown = run("delete", "photos/dogs/0.png", "--index", own_index)
    assert (shown.code, shown.out, shown.err) == (0, f"{own_index}: 1 picture deleted, 7 pictures left\n", "")
    assert run("delete", "photos/dogs/1.png", "photos/cats", "--index", own_index, "--json").json == {
        "deleted": 5,
        "items": 2,
    }
    (own_index.parent / "photos" / "bad.png").write_bytes(b"")
    assert run("index", "photos", "--index", own_index, "--json").json["indexed"] == 6
    shown = run("delete", "photos", "--index", own_index)
    assert shown.out == f"{own_index}: 8 pictures and 1 skipped file deleted, 0 pictures left\n"
    assert "the index holds no pictures yet" in run("search", "photos/cats/0.png", "--index", own_index).err


def test_delete_takes_ids_and_names_that_lead_through_links(run, own_index):
    [shown] = run("search", "--item", 1, "-k", 1, "--index", own_index, "--json").json["queries"]
    assert shown["hits"][0]["id"] == 1
    assert run("delete", "--item", 1, "--item", 2, "--index", own_index, "--json").json == {"deleted": 2, "items": 6}
    (own_index.parent / "link").symlink_to(own_index.parent / "photos")
    assert run("delete", own_index.parent / "link" / "dogs", "--index", own_index).code == 0
    assert run("info", own_index, "--json").json["metadata"]["label"]["common"] == [{"value": "cats", "pictures": 2}]


def test_what_chooses_an_encoder_is_told_to_be_of_no_use_for_an_item(run, own_index):
    assert "is not used" in run("search", "--item", 1, "--encoder", "S", "--index", own_index).err
    assert "is not used" not in run("search", "--item", 1, "--index", own_index).err


def test_a_hit_whose_file_is_gone_is_told(run, own_index):
    picture = own_index.parent / "photos" / "dogs" / "0.png"
    assert "not there now" not in run("search", picture, "--index", own_index).err
    (own_index.parent / "photos" / "cats" / "0.png").unlink()
    shown = run("search", picture, "--index", own_index)
    assert "not there now: 1 file of these; matvit index FOLDER --delete forgets them" in shown.err


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--strict"], 1)])
def test_skipped_files_are_listed_and_fail_only_when_strict(run, own_index, flags, code):
    pictures = own_index.parent / "photos"
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    done = run("index", pictures, "--index", own_index, "--json", *flags)
    assert done.code == code
    assert [Path(skipped["path"]).name for skipped in done.json["skipped"]] == ["broken.jpg"]
    assert done.json["skipped"][0]["reason"]
    shown = run("index", pictures, "--index", own_index, *flags)
    assert shown.code == code
    assert "1 skipped" in shown.out
    assert "broken.jpg" in shown.err


def test_index_and_search_share_the_default_index(run, photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("index", photos, "--encoder", checkpoint).code == 0
    assert (tmp_path / "photos.index").is_dir()
    assert run("search", photos / "cats" / "0.png").code == 0


# --- search --------------------------------------------------------------------------------------


def test_search_finds_the_picture_itself_first(run, index, photos):
    queries = [photos / "cats" / "1.png", photos / "dogs" / "2.png"]
    done = run("search", *queries, "--index", index, "--encoder", "XL", "-k", 3, "--json")
    assert (done.code, done.err) == (0, "")
    assert list(done.json) == ["queries"]
    for query, answer in zip(queries, done.json["queries"], strict=True):
        assert list(answer) == ["query", "encoder", "spec", "runtime", "latency_ms", "hits"]
        assert list(answer["latency_ms"]) == ["preprocess", "encode", "search", "total"]
        assert [list(hit) for hit in answer["hits"]] == [["rank", "id", "path", "score", "metadata"]] * 3
        assert answer["query"] == answer["hits"][0]["path"] == str(query)
        assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]


def test_search_shows_ids_and_paths_from_the_current_folder_on(run, index, photos, monkeypatch):
    monkeypatch.chdir(photos)
    [hit] = run("search", "--item", 0, "--index", index, "-k", 1, "--json").json["queries"][0]["hits"]
    place = os.path.relpath(hit["path"], photos)
    shown = run("search", "--item", 0, "--index", index, "-k", 1).out.split("\n")
    title, columns, _, row, *_ = [line for line in shown if line.strip()]
    assert (title.strip(), columns.split()) == (place, ["rank", "id", "score", "picture", "metadata"])
    assert row.split()[:4] == ["1", "0", "1.000", place]
    title = run("search", photos / "cats" / "1.png", "--item", 0, "--index", index, "--fuse", "mean").out.split("\n")[0]
    assert title.strip() == f"cats/1.png + {place}"


def test_search_refuses_a_folder_and_an_unknown_name_before_the_encoder_is_loaded(run, index, photos, monkeypatch):
    monkeypatch.setattr("retrieval.retriever.load_encoder", None)  # any use would fail
    folder = run("search", photos, "--index", index)
    assert (folder.code, folder.err) == (2, f"error: {photos}: is a folder, not a picture; name pictures\n")
    unknown = run("search", photos / "cats" / "1.png", "--index", index, "--where", "lable=cats")
    assert (unknown.code, unknown.err) == (2, "error: where: no picture has 'lable'; use one of: label\n")


def test_search_says_that_no_picture_has_a_value_before_the_encoder_is_loaded(run, index, photos, monkeypatch):
    def load(*_, **__):
        raise CheckpointError(what="is away", where="encoder", fix="wait")

    monkeypatch.setattr("retrieval.retriever.load_encoder", load)
    done = run("search", photos / "cats" / "1.png", "--index", index, "--where", "label=cat")
    assert done.code == 2
    note, error = done.err.strip().split("\n")
    assert "cats" in note
    assert error == "error: encoder: is away; wait"


def test_search_names_the_submodel_in_its_canonical_form(run, index, photos):
    done = run("search", photos / "cats" / "1.png", "--index", index, "--encoder", "2s", "--json")
    assert (done.json["queries"][0]["encoder"], done.json["queries"][0]["spec"]) == ("2s", "S")


def test_search_shows_a_table_with_the_split_of_the_time(run, index, photos, monkeypatch):
    monkeypatch.chdir(photos)
    shown = run("search", photos / "cats" / "1.png", "--index", index, "--encoder", "S")
    assert "cats/1.png" in shown.out
    assert "S on torch-" in shown.out
    assert "preprocess" in shown.out


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
@pytest.mark.parametrize("name", [b"\xff[b]\n.png", b"\x1b[31m.png", "grün :smile:.png".encode()])
def test_any_file_name_survives_json_and_cannot_upset_a_terminal(run, own_index, name):
    pictures = own_index.parent / "photos"
    path = Path(os.fsdecode(os.fsencode(pictures) + b"/" + name))
    shutil.copy(pictures / "cats" / "0.png", path)
    assert run("index", pictures, "--index", own_index).code == 0
    found = run("search", path, "--index", own_index, "-k", 2, "--json")
    assert os.fsencode(pictures) + b"/" + name in [os.fsencode(hit["path"]) for hit in found.json["queries"][0]["hits"]]
    shown = run("search", path, "--index", own_index, "-k", 2)
    assert shown.code == 0
    assert "\x1b[31m" not in shown.out


def test_search_takes_conditions_thresholds_items_and_several_pictures_as_one_query(run, index, photos):
    cat, dog = photos / "cats" / "0.png", photos / "dogs" / "0.png"

    def hits(*arguments):
        done = run("search", *arguments, "--index", index, "--json")
        assert (done.code, done.err) == (0, "")
        [query] = done.json["queries"]
        return query["hits"]

    assert {hit["metadata"]["label"] for hit in hits(cat, "--where", "label=dogs")} == {"dogs"}
    assert len(hits(cat, "--where", "label=dogs", "--where", "label=cats")) == 8
    assert len(hits(cat, "--min-score", -1)) == 8
    own = hits(cat, "-k", 1)[0]
    assert hits("--item", own["id"], "-k", 1)[0]["path"] == str(cat)
    assert str(cat) not in [hit["path"] for hit in hits(cat, "--exclude-self")]
    for options, name in (
        (["--fuse", "mean", dog], f"{cat} + {dog}"),
        (["--fuse", "rank", dog], f"{cat} + {dog}"),
        (["--unlike", dog], f"{cat} - {dog}"),
    ):
        [query] = run("search", cat, *options, "--index", index, "-k", 3, "--json").json["queries"]
        assert (query["query"], len(query["hits"])) == (name, 3)


def test_a_range_of_numbers_names_the_texts_that_it_leaves_out(run, tmp_path, photos, checkpoint):
    cats = photos / "cats"
    (tmp_path / "a.csv").write_text(f"path,year\n{cats / '0.png'},2019\n{cats / '1.png'},2021\n")
    (tmp_path / "b.csv").write_text(f"path,year\n{cats / '2.png'},2020\n{cats / '3.png'},unknown\n")
    lists, index = (tmp_path / "a.csv", tmp_path / "b.csv"), tmp_path / "years.index"
    run("index", *lists, "--index", index, "--checkpoint", checkpoint)
    done = run("search", cats / "0.png", "--index", index, "--where", "year>=2020", "--where", "year<2030", "--json")
    assert {hit["metadata"]["year"] for hit in done.json["queries"][0]["hits"]} == {2021, "2020"}
    assert done.err == "pictures whose 'year' is no number are left out: unknown\n"
    done = run("search", cats / "0.png", "--index", index, "--where", f"year<{'9' * 400}", "--json")
    assert len(done.json["queries"][0]["hits"]) == 3


def test_a_value_that_no_picture_has_finds_nothing_and_a_note_names_the_nearest(run, index, photos):
    picture = photos / "cats" / "0.png"
    shown = run("search", picture, "--index", index, "--where", "label=Dogz", "--json")
    assert (shown.code, shown.json["queries"][0]["hits"]) == (0, [])
    assert shown.err == "no picture has label=Dogz; there are dogs, cats\n"
    some = run("search", picture, "--index", index, "--where", "label=cats", "--where", "label=birds", "--json")
    assert (len(some.json["queries"][0]["hits"]), some.err) == (4, "no picture has label=birds; there are cats, dogs\n")
    assert run("search", picture, "--index", index, "--where", "label=cats").err == ""


def test_duplicates_are_listed_in_groups(run, own_index):
    pictures = own_index.parent / "photos"
    shutil.copy(pictures / "cats" / "0.png", pictures / "dogs" / "copy.png")
    assert run("index", pictures, "--index", own_index).code == 0
    for arguments in (["--exact"], ["--min-score", "1"]):
        [group] = run("duplicates", own_index, *arguments, "--json").json["groups"]
        assert [list(picture) for picture in group] == [["id", "path", "score", "same_content", "is_link"]] * 2
        assert [Path(picture["path"]).name for picture in group] == ["0.png", "copy.png"]
    shown = run("duplicates", own_index, "--exact")
    assert shown.out.startswith("1 group, 2 pictures")
    first, second = (line for line in shown.out.splitlines() if ".png" in line)
    assert ("first" in first, "same content" in first) == (True, False)
    assert ("copy.png" in second, "same content" in second) == (True, True)


def test_a_link_among_duplicates_is_told_from_a_copy(run, own_index):
    pictures = own_index.parent / "photos"
    (pictures / "dogs" / "link.png").symlink_to(pictures / "cats" / "0.png")
    assert run("index", pictures, "--index", own_index).code == 0
    [group] = run("duplicates", own_index, "--exact", "--json").json["groups"]
    assert [picture["is_link"] for picture in group] == [False, True]
    assert "same content, a link" in run("duplicates", own_index, "--exact").out


# --- info and verify -----------------------------------------------------------------------------


def test_info_of_a_checkpoint(run, checkpoint):
    found = run("info", checkpoint, "--json").json
    assert list(found) == ["encoder", "embedding_dim", "space_id", "weights_sha256", "submodels", "axes"]
    model = MatViT.from_pretrained(checkpoint)
    assert (found["space_id"], found["weights_sha256"]) == (model.space_id, model.weights_sha256)
    assert [submodel["name"] for submodel in found["submodels"]] == ["S", "M", "L", "XL"]
    for submodel in found["submodels"]:
        assert list(submodel) == ["name", "spec", "flops", "params", "relative_flops", "quality"]
        assert submodel["params"] == sum(tensor.numel() for tensor in model.extract(submodel["spec"]).parameters())
    assert found["submodels"][-1]["relative_flops"] == 1
    assert list(found["axes"]) == ["ffn"]


def test_info_of_an_index_tells_of_both(run, index, checkpoint):
    found, encoder = run("info", index, "--json").json, run("info", checkpoint, "--json").json
    assert encoder.items() <= found.items()
    assert found["items"] == 8
    assert {"generation", "index_type", "bytes"} <= set(found)
    assert "8 pictures" in run("info", index).out


def test_info_shows_what_an_index_holds_without_its_encoder(run, photos, checkpoint, tmp_path, monkeypatch):
    rows = ["path,price,kept,label"]
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        rows.append(f"{path},{number / 2},{'yes' if number else ''},{'cat' if number < 5 else 'dog'}")
    (tmp_path / "shop.csv").write_text("\n".join(rows))
    index = tmp_path / "shop.index"
    assert run("index", tmp_path / "shop.csv", "--index", index, "--encoder", checkpoint).code == 0
    assert run("info", index, "--json").json["metadata"]["label"] == {
        "pictures": 8,
        "values": 2,
        "common": [{"value": "cat", "pictures": 5}, {"value": "dog", "pictures": 3}],
        "range": None,
    }
    monkeypatch.setattr("matvit_app.services.load_encoder", None)  # any use would fail
    lines = run("info", index).out.splitlines()
    assert lines[0].startswith(f"{index}: 8 pictures")
    assert not any("generation" in line or line.startswith("space") for line in lines)
    assert set(lines[1:4]) == {
        "price: 8 pictures, 0 to 3.5",
        "label: 8 pictures, 2 values: cat (5), dog (3)",
        "kept: 7 pictures, 1 value: yes (7)",
    }
    assert lines[-1] == f"submodels that can search it: matvit info {checkpoint}"


def test_info_says_that_the_quality_was_not_measured_on_ones_own_pictures(run, checkpoint, tmp_path):
    assert "not on yours" not in run("info", checkpoint).out  # its table is empty
    shutil.copytree(checkpoint, tmp_path / "measured")
    row = {"name": "S", "spec": "S", "flops": 1, "params": 1, "relative_flops": 0.5, "quality": {"recall@1": 0.75}}
    (tmp_path / "measured" / "pareto.json").write_text(json.dumps([row]))
    shown = run("info", tmp_path / "measured").out
    assert "0.750" in shown
    assert "recall@1: measured on the pictures of whoever made the encoder" in shown
    assert "not on yours" in shown


def test_verify_whole_things(run, index, checkpoint):
    for target, kind in ((index, "index"), (checkpoint, "checkpoint")):
        found = run("verify", target, "--json")
        assert found.code == 0
        assert found.json == {
            "target": str(target),
            "kind": kind,
            "ok": True,
            "problems": [],
            "sampled": 8 if kind == "index" else 0,
            "unusable": 0,
            "unsampled": None,
        }
    assert run("verify", index, "--sample", 0, "--json").json["sampled"] == 0


def test_verify_without_the_encoder_is_told_but_no_damage(run, photos, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "encoder")
    index = tmp_path / "own.index"
    assert run("index", photos, "--index", index, "--encoder", tmp_path / "encoder").code == 0
    (tmp_path / "encoder").rename(tmp_path / "moved")
    found = run("verify", index)
    assert (found.code, found.out) == (0, f"{index}: index is whole\n")
    assert "no picture was embedded once more" in found.err
    assert "cannot be loaded" in found.err
    asked = run("verify", index, "--sample", 1)
    assert asked.code == 1  # a proof was asked for
    assert asked.out.endswith(f"{index}: index cannot be compared with its pictures\n")
    assert run("verify", index, "--checkpoint", tmp_path / "moved", "--json").json["sampled"] == 8
    noted = run("upgrade", index, "--checkpoint", tmp_path / "moved")
    assert f"{index}: uses that encoder now, and nothing was to be embedded" in noted.out
    assert run("verify", index, "--json").json["sampled"] == 8


@pytest.mark.parametrize("kind", ["index", "checkpoint"])
def test_verify_finds_one_flipped_bit(run, kind, own_index, checkpoint, tmp_path):
    if kind == "checkpoint":
        target = tmp_path / "copy"
        shutil.copytree(checkpoint, target)
        damaged = target / "model.safetensors"
    else:
        target = own_index
        damaged = next(target.glob("segments/*/embeddings.f32"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    found = run("verify", target, "--json")
    assert (found.code, found.json["kind"], found.json["ok"]) == (1, kind, False)
    assert damaged.name in found.json["problems"][0]
    assert run("verify", target).code == 1


def test_verify_lists_the_first_problems_and_counts_the_others(run, index, monkeypatch):
    problems = tuple(f"id {number} belongs to several items" for number in range(13))
    monkeypatch.setattr(services, "verify", lambda *_, **__: services.Verification(kind="index", problems=problems))
    shown = run("verify", index).out.splitlines()
    assert shown == [*problems[:10], "3 more problems: --json lists them", f"{index}: index is damaged"]
    assert run("verify", index, "--json").json["problems"] == list(problems)


# --- extract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["S", "XL", "2w48"])
def test_extracted_weights_build_with_timm_alone(run, checkpoint, spec, tmp_path):
    out = tmp_path / "small.safetensors"
    done = run("extract", checkpoint, "--spec", spec, "--out", out, "--json")
    assert done.code == 0
    description = json.loads(Path(done.json["config"]).read_text())
    module, _, name = description["timm_class"].rpartition(".")
    vit = getattr(import_module(module), name)(**description["timm_arguments"]).eval()
    vit.load_state_dict(load_file(out), strict=True)
    model = MatViT.from_pretrained(checkpoint)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(normalize(vit(images), dim=-1), model(images, spec))
        torch.testing.assert_close(normalize(read_extracted(out)(images), dim=-1), model(images, spec))


def test_mixed_widths_load_with_our_own_reader(run, checkpoint, tmp_path):
    out = tmp_path / "mixed.safetensors"
    assert run("extract", checkpoint, "--spec", "1S.1XL", "--out", out).code == 0
    model, images = MatViT.from_pretrained(checkpoint), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(normalize(read_extracted(out)(images), dim=-1), model(images, "1S.1XL"))
    again = resolve_model_data_config(read_extracted(str(out)))
    assert again == resolve_model_data_config(model.extract("1S.1XL"))


def test_an_earlier_extraction_is_replaced(run, checkpoint, tmp_path):
    out = tmp_path / "small.safetensors"
    assert run("extract", checkpoint, "--spec", "S", "--out", out).code == 0
    out.unlink()  # as if the machine had died between the two files
    for spec in ("S", "M"):
        done = run("extract", checkpoint, "--spec", spec, "--out", out, "--json").json
        assert (done["spec"], read_extracted(out).training) == (spec, False)


def test_damaged_extracted_weights_are_refused(run, checkpoint, tmp_path):
    out = tmp_path / "s.safetensors"
    assert run("extract", checkpoint, "--spec", "S", "--out", out).code == 0
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="sha256"):
        read_extracted(out)
    out.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_extracted(out)


def test_extracted_weights_that_do_not_fit_their_json_file_are_refused(run, checkpoint, tmp_path):
    out = tmp_path / "s.safetensors"
    assert run("extract", checkpoint, "--spec", "S", "--out", out).code == 0
    described = json.loads(out.with_suffix(".json").read_text())
    described["architecture"]["ffn_widths"][0] += 1
    out.with_suffix(".json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"s\.safetensors: .*; extract it again"):
        read_extracted(out)


# --- eval ----------------------------------------------------------------------------------------


def test_eval_gives_the_cross_test_matrix(run, photos, checkpoint):
    done = run("eval", photos, "--encoder", checkpoint, "--queries", "S,XL", "--galleries", "XL,M", "--json")
    assert (done.code, done.err) == (0, "")
    assert {query: list(row) for query, row in done.json["matrix"].items()} == {"S": ["XL", "M"], "XL": ["XL", "M"]}
    quality = done.json["matrix"]["S"]["XL"]
    assert {"recall@1", "recall@10", "map@100", "agreement@10", "n_queries"} <= set(quality)
    assert quality["n_queries"] == 8
    assert done.json["matrix"]["XL"]["XL"]["agreement@10"] == 1
    assert set(done.json["flops"]) == {"S", "M", "XL"}


def test_eval_limit_and_gallery(run, photos, checkpoint):
    done = run(
        "eval", photos, "--gallery", photos, "--encoder", checkpoint, "--limit", 3, "--keep-near-copies", "--json"
    )
    assert done.json["matrix"]["XL"]["XL"]["n_queries"] == 3
    assert done.json["matrix"]["XL"]["XL"]["recall@1"] == 1  # each query is in the gallery


def test_eval_shows_a_table(run, photos, checkpoint):
    shown = run("eval", photos, "--encoder", checkpoint)
    assert shown.code == 0
    assert all(word in shown.out for word in ("recall@1", "mAP@100", "agreement@10", "loss", "XL"))


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_reports_everything(run):
    found = run("doctor", "--json")
    assert found.json["ok"] == (found.code == 0) == (not found.json["problems"])
    assert set(found.json) == {
        "ok",
        "problems",
        "python",
        "platform",
        "versions",
        "devices",
        "threads",
        "runtimes",
        "checkpoints",
        "extras",
    }
    assert "torch-cpu" in found.json["runtimes"]
    extras = [extra["name"] for extra in found.json["extras"]]
    assert extras == ["torch", "parquet", "fsspec", "app", "train", "tensorboard"]
    assert run("doctor").code == found.code


# --- demo ----------------------------------------------------------------------------------------


@pytest.fixture
def demo(run, checkpoint, tmp_path, monkeypatch):
    """The demo's command line, with the tiny encoder in the bundled one's place."""
    monkeypatch.setattr(services, "DEFAULT_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: run("demo", "--no-app", *arguments)


def test_demo_measures_four_encoders_on_one_index(demo, tmp_path):
    done = demo("--json")
    assert (done.code, done.err) == (0, "")
    assert Path(done.json["index"]).parent == tmp_path / "cache"
    assert [row["spec"] for row in done.json["submodels"]] == ["S", "M", "L", "XL"]
    for row in done.json["submodels"]:
        assert list(row) == ["spec", "relative_flops", "params", "ms_per_query", "recall@1", "agreement@10"]
        assert row["ms_per_query"] > 0
        assert 0 <= row["recall@1"] <= 1
    assert done.json["submodels"][-1]["agreement@10"] == 1
    assert np.all(np.diff([row["relative_flops"] for row in done.json["submodels"]]) > 0)
    assert done.json["queries"] < done.json["photos"]


def test_demo_reuses_its_index_and_mends_a_damaged_one(demo, tmp_path):
    first = services.demo_index()
    generation = services.index_info(first).generation
    assert services.demo_index() == first
    assert services.index_info(first).generation == generation
    (first / "CURRENT").write_text("damaged")
    services.demo_index()
    assert services.verify(str(first)).problems == ()


def test_compact_drops_what_was_deleted(run, index, photos, tmp_path):
    path = shutil.copytree(index, tmp_path / "copy.index")
    Index.open(path).delete([photos / "cats"])
    shown = run("compact", path, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert (shown.json["segments"], shown.json["dropped"]) == (1, 4)
    assert shown.json["bytes"] < shown.json["bytes_before"]
    assert "1 segment -> 1, 0 dead items dropped" in run("compact", path).out
    assert run("info", path, "--json").json["items"] == 4


def test_upgrade_moves_an_index_to_another_checkpoint(run, own_index, other_checkpoint, tmp_path):
    gone = next((tmp_path / "photos").rglob("*.png"))
    data = gone.read_bytes()
    gone.unlink()
    shown = run("upgrade", own_index, "--encoder", other_checkpoint)
    assert shown.code == 1
    assert f"missing {gone}: no such file" in shown.err
    gone.write_bytes(data)
    shown = run("upgrade", own_index, "--encoder", other_checkpoint, "--json")
    assert shown.code == 0
    assert (shown.json["embedded"], shown.json["resumed"], shown.json["published"]) == (1, 7, True)
    assert run("verify", own_index, "--sample", 3, "--json").json["sampled"] == 3
    assert run("search", gone, "--index", own_index, "-k", 1, "--json").json["queries"][0]["hits"][0]["score"] > 0.999


def test_repair_finds_a_lost_current_and_says_what_it_did(run, own_index, tmp_path):
    (own_index / "CURRENT").unlink()
    (own_index / "segments" / ("0" * 16)).mkdir()
    shown = run("repair", own_index)
    assert shown.code == 0
    assert "removed segments/0000000000000000\n" in shown.err
    assert "CURRENT: a file of the index is missing" in shown.err
    assert "is whole; 2 problems, 0 pictures embedded again, 0 lost" in shown.out
    [path] = own_index.glob("segments/*/embeddings.f32")
    path.write_bytes(b"")
    next((tmp_path / "photos").rglob("*.png")).unlink()
    shown = run("repair", own_index, "--json")
    assert (shown.code, len(shown.json["lost"]), shown.json["whole"]) == (1, 1, False)
    shown = run("repair", own_index, "--drop-lost", "--json")
    assert shown.json["embedded"] == 7
    assert any(name.startswith("segments/") for name in shown.json["removed"])
    assert run("verify", own_index).code == 0


def test_info_tells_skipped_files_by_reason_and_lists_them_on_demand(run, photos, checkpoint, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "a.png").write_bytes((photos / "cats" / "0.png").read_bytes())
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes()[: -30 if name < "c" else -60])
    index = tmp_path / "i"
    assert run("index", folder, "--index", index, "--encoder", checkpoint).code == 0
    found = run("info", index, "--json").json
    assert (found["skipped"], found["skipped_reasons"]) == (2, {"damaged picture": 2})
    assert "skipped_files" not in found
    listed = run("info", index, "--skipped", "--json").json["skipped_files"]
    assert [file["path"] for file in listed] == [str(folder / "b.png"), str(folder / "c.png")]
    assert "skipped 2: damaged picture" in run("info", index).out
    shown = run("info", index, "--skipped").out.splitlines()
    heads = [f"{index}: 1 picture, ", "skipped 2: damaged picture", *(f"skipped {file['path']}" for file in listed)]
    assert [line.startswith(head) for line, head in zip(shown, [*heads, "encoder "], strict=False)] == [True] * 5


def test_a_folder_without_pictures_is_told_before_an_encoder_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("matvit_app.services.load_encoder", None)  # any use would fail
    done = run("index", tmp_path, "--index", tmp_path / "i")
    assert (done.code, "holds no pictures" in done.err) == (2, True)


def test_index_type_and_memory_choose_how_an_index_is_searched(run, photos, checkpoint, tmp_path):
    path = tmp_path / "new.index"
    done = run("index", photos, "--index", path, "--encoder", checkpoint, "--index-type", "auto", "--max-ram", "1GB")
    assert done.code == 0
    assert "exact search (" in done.err
    assert "of 1,000.0 MB allowed)" in done.err
    assert "of 2,000.0 MB allowed)" in run("index", photos, "--index", path, "--max-ram", "2GB").err
    for arguments in (["--index-type", "tree"], ["--max-ram", "much"], ["--max-ram", "9" * 400]):
        refused = run("index", photos, "--index", path, *arguments)
        assert (refused.code, refused.out) == (2, "")
        assert arguments[0] in refused.err
        assert arguments[1] in refused.err


def test_how_an_approximate_index_is_searched_is_told_with_both_settings():
    old = Path(__file__).parents[1] / "retrieval" / "formats" / "version-1-approximate"
    assert described(services.search_json(Index.open(old).info())) == (
        "sq search (as asked), recall@10 1.000 of exact search on 6 held-out pictures with effort 1 and depth 20"
    )


def test_what_an_index_warns_of_is_one_sentence_on_stderr(run, index, photos, monkeypatch):
    def warning_first(*arguments, **named):
        warnings.warn("the cache is damaged; run: matvit repair", IndexWarning, stacklevel=1)
        return open_search(*arguments, **named)

    monkeypatch.setattr("retrieval.gallery.open_search", warning_first)
    warnings.simplefilter("default")  # pytest puts its own filters back
    done = run("search", photos / "cats" / "0.png", "--index", index, "--json")
    assert (done.code, done.err) == (0, "warning: the cache is damaged; run: matvit repair\n")
    assert len(done.json["queries"]) == 1
