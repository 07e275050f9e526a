"""The command line as people and scripts see it: names, options, help, start-up."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from PIL import Image

from matvit_app.cli.main import cli, main
from matvit_app.doctor import EXTRAS

COMMANDS = typer.main.get_command(cli).commands  # type: ignore[attr-defined]

# Scripts rely on these. Adding one is a decision: write it here and in docs/reference. Removing one breaks people.
OPTIONS = {
    "demo": ["--no-app", "--host", "--port", "--no-browser", "--json"],
    "index": ["images", "--index", "--checkpoint", "--delete", "--index-type", "--max-ram", "--strict", "--json"],
    "search": [
        "images",
        "--index",
        "--item",
        "--encoder",
        "--max-latency-ms",
        "--min-recall",
        "--checkpoint",
        "-k",
        "--min-score",
        "--where",
        "--exclude-self",
        "--unlike",
        "--fuse",
        "--json",
    ],
    "delete": ["paths", "--item", "--index", "--json"],
    "info": ["target", "--skipped", "--json"],
    "train": ["recipe", "--out", "--fresh", "--tensorboard", "--json"],
    "extract": ["checkpoint", "--spec", "--out", "--json"],
    "eval": [
        "dataset",
        "--gallery",
        "--checkpoint",
        "--queries",
        "--galleries",
        "--classes",
        "--protocol",
        "--keep-near-copies",
        "--recall-at",
        "--limit",
        "--device",
        "--plot",
        "--write-table",
        "--json",
    ],
    "convert": ["timm_model", "--out", "--weights", "--pretrained", "--images", "--image-size", "--json"],
    "adapt": ["checkpoint", "--images", "--out", "--json"],
    "app": ["index", "--checkpoint", "--host", "--port", "--no-browser", "--json"],
    "doctor": ["--json"],
    "verify": ["target", "--sample", "--checkpoint", "--json"],
    "compact": ["path", "--json"],
    "duplicates": ["path", "--min-score", "--exact", "--json"],
    "upgrade": ["path", "--checkpoint", "--drop-missing", "--json"],
    "repair": ["path", "--checkpoint", "--drop-lost", "--json"],
}


def test_commands_and_options_are_the_frozen_ones():
    found = {
        name: [parameter.opts[0] for parameter in command.params if parameter.name != "help"]
        for name, command in COMMANDS.items()
    }
    assert found == OPTIONS


def test_a_checkpoint_has_one_option_everywhere_whose_older_name_still_counts():
    both = {
        name: parameter.opts
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name == "checkpoint" and len(parameter.opts) > 1
    }
    assert both == {name: ["--checkpoint", "--encoder"] for name in ("index", "eval", "upgrade", "repair")}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_every_command_explains_every_option_and_shows_an_example(run, name):
    shown = run(name, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert f"matvit {name}" in shown.out.partition("Example")[2]
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert "[default" not in parameter.help  # rich would take it for markup
        if isinstance(parameter.show_default, str):
            assert f"[default: ({parameter.show_default})]" in " ".join(shown.out.replace("│", " ").split())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_paragraphs_of_help_fill_a_terminal_of_any_width(run, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    lines = run(name, "--help").out.partition("Example")[0].splitlines()[3:]
    for line, below in pairwise(map(str.strip, lines)):
        assert not (line and below) or len(f"{line} {below.split()[0]}") > 68, line


def test_the_hubs_tries_without_a_network_are_not_shown(tmp_path):
    script = """
import sys, time
from matvit_app.cli.main import main
time.sleep = lambda seconds: None  # between two tries
sys.exit(main(["convert", "vit_tiny_patch16_224", "--pretrained", "--out", "elastic"]))
"""
    offline = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "the hub could not be reached" in done.stderr


@pytest.mark.parametrize(
    ("asked", "count"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_threads_of_a_command_soon_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch, asked, count):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]} | asked)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_without_arguments_the_commands_are_listed(run):
    shown = run()
    assert shown.code == 0
    assert all(name in shown.out for name in OPTIONS)


def test_version(run):
    assert run("--version").out.startswith("matvit-retrieval ")


def test_help_needs_neither_torch_nor_faiss_nor_numpy():
    script = """
import sys
from matvit_app.cli.main import main
assert main(["index", "--help"]) == 0
print(sorted({"torch", "timm", "faiss", "numpy", "streamlit"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("torch", ["info"], "torch"),
        ("torch", ["search", "picture.jpg"], "torch"),
        ("timm", ["extract", "matvit-small", "--spec", "S", "--out", "s.safetensors"], "torch"),
        ("yaml", ["train", "matvit-small", "--out", "run"], "train"),
        ("tensorboard", ["train", "matvit-small", "--out", "run", "--tensorboard"], "tensorboard"),
        ("streamlit", ["app"], "app"),
    ],
)
def test_a_missing_package_is_answered_with_its_install_line(missing, arguments, extra, index, tmp_path):
    # None in sys.modules makes Python treat the package as not installed.
    script = f"""
import sys
sys.modules['{missing}'] = None
from matvit_app.cli.main import main
sys.exit(main({arguments}))
"""
    (tmp_path / "photos.index").symlink_to(index)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f'pip install "matvit-retrieval[{extra}]"' in done.stderr


def test_extras_are_those_of_the_package():
    """`doctor` and the missing-package message name the packages that pyproject.toml does."""
    modules = {"lightning-fabric": "lightning_fabric", "pyyaml": "yaml", "vl-convert-python": "vl_convert"}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        declared = [requirement.partition(">")[0] for requirement in project["optional-dependencies"][extra]]
        own = [modules.get(name, name) for name in declared if "[" not in name]
        assert tuple(own) == packages
