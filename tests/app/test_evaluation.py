"""`matvit eval` beyond the matrix: mixed submodels, the plane, and the checkpoint's table."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from matvit import MatViT


@pytest.fixture
def mine(checkpoint, tmp_path):
    """A checkpoint folder that a test may change."""
    folder = tmp_path / "mine"
    shutil.copytree(checkpoint, folder)
    return folder


def test_mixed_submodels_are_measured_with_the_uniform_ones(run, photos, checkpoint):
    done = run("eval", photos, "--encoder", checkpoint, "--queries", "XL,mixed:8", "--device", "cpu", "--json")
    assert (done.code, done.err) == (0, "")
    mixed, matrix = done.json["mixed"], done.json["matrix"]
    assert (mixed["asked"], mixed["specs"], len(mixed["points"])) == (8, 8, 8)
    assert set(matrix) == {"S", "M", "L", "XL"} | set(mixed["points"])
    assert mixed["above_line"] == sum(point["above_line"] for point in mixed["points"].values())
    assert all(matrix[spec]["XL"]["recall@1"] == point["recall@1"] for spec, point in mixed["points"].items())
    assert set(done.json["pareto_front"]) <= set(matrix)


def test_the_table_shows_named_submodels_and_the_front_and_says_when_there_are_fewer_mixed_ones(
    run, photos, checkpoint
):
    shown = run("eval", photos, "--encoder", checkpoint, "--queries", "mixed:100")
    assert "12 mixed submodels" in shown.out  # 4 x 4 granularities of two blocks, without the uniform ones
    for kind, most in (("as the paper advises", 3), ("at random", 9)):
        (row,) = (line for line in shown.out.splitlines() if kind in line)
        assert re.search(rf"of {most} +[+-]\d+\.\d +[+-]\d+\.\d +[+-]\d+\.\d", row)
    assert "100 mixed submodels were asked for, 12 different ones" in shown.err


def test_recall_is_measured_at_the_numbers_of_hits_that_are_asked_for(run, photos, checkpoint):
    done = run("eval", photos, "--encoder", checkpoint, "--queries", "S", "--recall-at", "1, 3,1000", "--json")
    quality = done.json["matrix"]["S"]["XL"]
    assert [name for name in quality if name.startswith("recall")] == ["recall@1", "recall@3", "recall@1000"]
    assert quality["recall@1"] <= quality["recall@3"] <= quality["recall@1000"] == 1
    assert set(quality["difference"]) == {"recall@1", "recall@3", "recall@1000", "map@100", "map@r"}


@pytest.mark.parametrize("numbers", ["0", "1,", "-1", "1.5", "ten", "9999999", "٣"])
def test_recall_at_no_number_of_hits_is_refused(run, photos, checkpoint, numbers):
    done = run("eval", photos, "--encoder", checkpoint, "--recall-at", numbers)
    assert (done.code, done.out) == (2, "")
    assert "are no numbers of hits" in done.err


def test_mixed_twice_is_refused(run, photos, checkpoint):
    done = run("eval", photos, "--encoder", checkpoint, "--queries", "mixed:3,mixed:4")
    assert (done.code, done.out) == (2, "")
    assert "ask once" in done.err


def drawn(page: Path) -> dict[str, Any]:
    """The page's Vega-Lite description."""
    text = page.read_text()
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.rindex("const spec = ") + len("const spec = "))[0]
    return found


def test_the_plane_is_one_page_with_every_submodel(run, photos, checkpoint, tmp_path):
    page = tmp_path / "plane.html"
    done = run("eval", photos, "--encoder", checkpoint, "--queries", "mixed:4", "--plot", page, "--json")
    line, front, dots = drawn(page)["layer"]
    assert sorted(row["spec"] for row in dots["data"]["values"]) == sorted(done.json["matrix"])
    assert [row["spec"] for row in line["data"]["values"]] == ["S", "M", "L", "XL"]
    assert {row["spec"] for row in front["data"]["values"]} == set(done.json["pareto_front"])


def test_the_plane_fetches_nothing_and_a_name_cannot_end_its_script(run, photos, checkpoint, tmp_path):
    folder = tmp_path / "<" / "script><b>"  # as a path: </script><b>
    shutil.copytree(photos, folder)
    page = tmp_path / "plane.html"
    assert run("eval", folder, "--encoder", checkpoint, "--queries", "S", "--plot", page).code == 0
    assert "script><b>" in drawn(page)["title"]["text"]
    assert "</script><b>" not in page.read_text()
    assert not re.search(r"<script[^>]+src=|<link", page.read_text())


def test_a_plot_into_a_missing_folder_is_refused_before_anything_is_computed(run, photos, checkpoint, tmp_path):
    done = run("eval", photos, "--encoder", checkpoint, "--plot", tmp_path / "gone" / "plane.html")
    assert done.code == 2
    assert "there is no folder" in done.err


def test_a_plot_that_cannot_be_written_or_would_lie_in_a_checkpoint_is_refused(run, photos, mine, tmp_path):
    (tmp_path / "plane.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")  # without anybody who reads it
    for place, why in (
        (tmp_path / "plane.html", "no file that may be"),
        (tmp_path / "pipe.html", "no file that may be"),
        (mine / "plane.html", "inside the checkpoint"),
    ):
        done = run("eval", photos, "--encoder", mine, "--plot", place)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert why in done.err


def test_a_plot_that_the_disk_refuses_takes_neither_the_figures_nor_the_earlier_one_along(
    run, photos, checkpoint, tmp_path, monkeypatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    page = tmp_path / "plane.html"
    assert run("eval", photos, "--encoder", checkpoint, "--plot", page).code == 0
    earlier = page.read_text()
    monkeypatch.setattr(os, "fsync", full)
    done = run("eval", photos, "--encoder", checkpoint, "--plot", page, "--json")
    assert done.code == 2
    assert done.json["matrix"]
    assert f"{page}" in done.err
    assert "No space left" in done.err
    assert page.read_text() == earlier


@pytest.mark.parametrize(("name", "why"), [("holiday.jpg", "ends in .html"), ("thesis.html", "no plot")])
def test_a_plot_replaces_only_a_plot(run, photos, checkpoint, tmp_path, name, why):
    (tmp_path / name).write_text("precious")
    done = run("eval", photos, "--encoder", checkpoint, "--plot", tmp_path / name)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert why in done.err
    assert (tmp_path / name).read_text() == "precious"


def test_the_front_becomes_the_checkpoints_table(run, photos, mine):
    before = MatViT.from_pretrained(mine)
    done = run("eval", photos, "--encoder", mine, "--queries", "S,XL,mixed:8", "--write-table", "--json")
    assert done.code == 0
    saved = MatViT.from_pretrained(mine)
    assert (saved.space_id, saved.weights_sha256) == (before.space_id, before.weights_sha256)
    rows = {row["spec"]: row for row in saved.pareto}
    assert set(rows) == {"S", "M", "L", "XL", *done.json["pareto_front"]}
    assert [row["flops"] for row in saved.pareto] == sorted(row["flops"] for row in saved.pareto)
    assert rows["S"]["quality"]["recall@1"] == done.json["matrix"]["S"]["XL"]["recall@1"]
    assert rows["S"]["measured"]["gallery_spec"] == "XL"
    assert rows["S"]["measured"]["n_queries"] == 8
    assert str(photos.parent) not in (mine / "pareto.json").read_text()


def test_a_table_is_measured_whole_and_keeps_what_else_its_rows_say(run, photos, mine):
    rows = [{"name": "cheap", "spec": "1S.1M", "flops": 1, "params": 1, "relative_flops": 0.1, "latency_ms": 7}]
    (mine / "pareto.json").write_text(json.dumps(rows))
    assert run("eval", photos, "--encoder", mine, "--queries", "1S.1M", "--write-table").code == 0
    table = {row["spec"]: row for row in MatViT.from_pretrained(mine).pareto}
    assert set(table) == {"1S.1M", "XL"}
    assert (table["1S.1M"]["name"], table["1S.1M"]["latency_ms"]) == ("cheap", 7)
    assert table["1S.1M"]["flops"] > 1
    assert "recall@1" in table["1S.1M"]["quality"]


def test_a_table_is_written_into_a_git_clone(run, photos, mine):
    (mine / ".gitattributes").write_text("*.safetensors filter=lfs")
    (mine / ".git").mkdir()
    assert run("eval", photos, "--encoder", mine, "--queries", "S", "--write-table").code == 0
    assert {row["spec"] for row in MatViT.from_pretrained(mine).pareto} >= {"S", "XL"}
    assert (mine / ".git").is_dir()


def test_a_table_always_holds_the_full_encoder_and_is_told_with_its_pictures(run, photos, mine):
    (mine / "pareto.json").write_text("[]")
    assert run("eval", photos, "--encoder", mine, "--queries", "S", "--write-table").code == 0
    assert {row["spec"] for row in MatViT.from_pretrained(mine).pareto} == {"S", "XL"}
    told = " ".join(run("info", mine).out.split())
    assert f"measured on the pictures of {photos.name}. Yours" in told


@pytest.mark.parametrize("galleries", ["S,XL", "M"])
def test_a_table_of_another_gallery_than_the_full_encoders_is_refused(run, photos, mine, galleries):
    before = (mine / "pareto.json").read_text()
    done = run("eval", photos, "--encoder", mine, "--queries", "S,XL", "--galleries", galleries, "--write-table")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "put XL first in --galleries" in done.err
    assert (mine / "pareto.json").read_text() == before


def test_the_bundled_checkpoints_table_is_not_written(run, photos):
    done = run("eval", photos, "--write-table")
    assert done.code == 2
    assert "copy the checkpoint" in done.err


def test_a_device_that_is_not_there_is_refused(run, photos, checkpoint):
    for name in ("cuda:99", "abacus", "meta", "hpu", "privateuseone", "mkldnn"):
        done = run("eval", photos, "--encoder", checkpoint, "--device", name)
        assert (done.code, done.out) == (2, "")
        assert f"'{name}' cannot be used on this machine" in done.err
        assert done.err.count("\n") == 1
