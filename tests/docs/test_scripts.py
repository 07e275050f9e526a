"""The scripts that people copy from run, and measure what they say: examples and benchmarks, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from matvit import MatViT
from matvit.progress import silent
from matvit_data import demo_folder
from retrieval.backends import KINDS
from retrieval.backends.build import build
from retrieval.backends.rows import MappedRows

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_start_finds_a_picture_by_itself_at_all_four_costs(tmp_path: Path) -> None:
    classes = sorted((demo_folder() / "images" / "caltech-101").iterdir())[:6]
    for photo_class in classes:
        shutil.copy(photo_class / "photo-1.webp", tmp_path / f"{photo_class.name}.webp")
    done = run("examples/quick_start.py", tmp_path, tmp_path / f"{classes[3].name}.webp")
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "6 pictures indexed by the full encoder"
    assert [row.split(":")[0].strip() for row in rows] == ["S", "M", "L", "XL"]
    assert all(f"best hit {classes[3].name}.webp" in row for row in rows)


def test_query_cost_measures_every_submodel_and_its_peer_beside_xl() -> None:
    done = run("benchmarks/query_cost.py", "--rounds", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["encoder"]: row for row in json.loads(done.stdout)["rows"]}
    assert {"S", "M", "L", "XL", "timm, by hand"} <= set(rows)
    assert rows["XL"]["ratio"] == 1
    assert rows["timm, by hand"]["flops_ratio"] == 1
    assert rows["S"]["flops_ratio"] < rows["M"]["flops_ratio"] < rows["L"]["flops_ratio"] < 1
    assert all(row["ms"] > 0 and row["gflops"] > 0 for row in rows.values())


def test_search_measures_every_kind_beside_its_peers() -> None:
    done = run(
        "benchmarks/search.py",
        "--sizes",
        "100,300",
        "--kinds",
        "exact,hnsw,sq",
        "--rounds",
        1,
        "--duplicates",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["size"] for result in results] == [100, 300]
    for result in results:
        assert result["duplicates"]["groups"] > 0
        kinds = result["approximate"]
        assert [kind["kind"] for kind in kinds] == ["hnsw", "sq"]
        for kind in kinds:
            assert all(0.9 < mean <= 1 and 0 <= error < 0.1 for mean, error in kind["recall"].values())
            assert 0 < kind["bytes"] < 10**6
        for row in (result["exact"], *kinds):
            for way in ("single", "batch"):
                assert row[way]["ms"] > 0
                assert all(0 < low <= middle <= high for low, middle, high in row[way]["ratios"].values())


def test_the_peers_of_the_search_benchmark_look_for_the_same_neighbours() -> None:
    """A ratio between searches that answer different questions would mean nothing."""
    benchmark = load("benchmarks/search.py")
    benchmark.BLOCK = 40
    gallery, queries = benchmark.vectors(200, 0), benchmark.vectors(3, 1)
    expected = np.argsort(-(queries @ gallery.T), axis=1)[:, : benchmark.K]
    searches = benchmark.exact_peers(gallery)
    assert set(searches) == {"ours", "faiss", "numpy", "torch"}
    built = build(KINDS["sq"], MappedRows([(gallery, np.arange(200))], dim=benchmark.DIM), progress=silent)
    for search in (*searches.values(), *benchmark.approximate_peers(KINDS["sq"], built, gallery).values()):
        assert search(queries).tolist() == expected.tolist()


def test_retriever_measures_its_calls_beside_their_parts() -> None:
    done = run("benchmarks/retriever.py", "--rows", 100, "--rounds", 2, "--specs", "S-d8-r56", "--json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["submodels"]
    assert row["spec"] == "S-d8-r56"
    assert row["bare_ms"] > 0
    assert all(0.5 < ratio < 5 for ratio in row["ratio"])


def test_open_index_measures_every_way_to_open() -> None:
    done = run("benchmarks/open_index.py", "--rows", 200, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"rows", "Index.open", "hashing the embeddings", "Retriever.open", "Index.verify"}
    assert all(value > 0 for value in result.values())


def test_ingest_measures_itself_beside_both_bounds_and_the_bare_forward_on_both_kinds_of_pictures() -> None:
    done = run("benchmarks/ingest.py", "--encoders", "S-d8-r56", "--pictures", 2, "--rounds", 1, "--cores", 0, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["pictures"], row["count"], row["cores"]) for row in rows] == [("160px", 2, 1), ("12MP", 2, 1)]
    for row in rows:
        core_ms, bounds, shares = row["core_ms"], row["bounds"], row["shares"]
        assert set(core_ms) == {"decode", "decode on all cores", "encode", "ingest"}
        assert bounds["shared cores"] == pytest.approx(1000 / (core_ms["decode"] + core_ms["encode"]))
        assert bounds["two devices"] <= bounds["forward"]
        assert shares == {name: pytest.approx(row["rate"] / bound) for name, bound in bounds.items()}
        assert row["parts_of_ingest"] == pytest.approx((core_ms["decode"] + core_ms["encode"]) / core_ms["ingest"])
        assert row["others"] >= 0
    assert rows[1]["core_ms"]["decode"] > rows[0]["core_ms"]["decode"]


def test_ingest_measures_the_memory_of_each_run_over_an_index() -> None:
    done = run("benchmarks/ingest.py", "--sizes", "30", "--json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)
    assert list(row) == ["size", "first", "again", "one more", "verify", "upgrade", "repair"]
    for one in list(row.values())[1:]:
        assert all(one["most"][kind] >= one["before"][kind] > 0 for kind in ("own", "files", "all"))
        assert one["opening"]["core_seconds"] > 0 < one["work"]["core_seconds"]


def test_decoders_measures_threads_beside_processes() -> None:
    sizes = ("--encoders", "S-d8-r56", "--pictures", 4, "--rounds", 1, "--sources", "160px")
    done = run("benchmarks/decoders.py", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    threads, processes = json.loads(done.stdout)
    assert (threads["workers"], processes["workers"]) == ("threads", "processes")
    assert processes["start s"] > threads["start s"]
    assert threads["workers MiB"] == 0 < processes["workers MiB"]
    assert all(row["decode/s"] > 0 and row["both/s"] > 0 for row in (threads, processes))


def test_adapting_is_measured_on_pictures_that_it_never_saw(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    MatViT.from_timm(vit).save_pretrained(tmp_path / "tiny")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(30):
            pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "data" / name / f"{number}.png")
    sizes = ("--encoder", tmp_path / "tiny", "--pictures", 45, "--queries", 15, "--specs", "S,XL")
    done = run("benchmarks/adapting.py", tmp_path / "data", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["pictures"], result["queries"]) == (45, 15)
    assert result["specs"]["XL"]["agreement@10"] == {"before": 1, "after": 1, "gain": [0, 0, 0]}
    assert ("S" in result["kept"]) == (result["specs"]["S"]["agreement@10"]["gain"][0] != 0)
