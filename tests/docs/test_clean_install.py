"""A wheel in an empty environment, with its base dependencies alone: no torch, and it explains itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
INSTALL_TORCH = 'pip install "matvit-retrieval[torch]"'

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Nothing of the environment that runs the tests may leak into the clean one.
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MATVIT_INDEX"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder far from the source tree, with one picture: `picture.png`."""
    folder = tmp_path_factory.mktemp("away")
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, away: Path) -> Path:
    """The scripts folder of a fresh environment into which the wheel was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("matvit", "retrieval", "app", "data", "tests"):  # tests: must not get in
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=away)
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("*.whl")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=away).returncode == 0
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    installed = run(scripts / "python", "-m", "pip", "install", "-q", wheel, cwd=away)
    assert installed.returncode == 0, installed.stderr
    return scripts


def test_the_base_install_has_no_torch_and_the_packages_import(scripts: Path, away: Path) -> None:
    assert run(scripts / "python", "-c", "import matvit, retrieval, matvit_app, matvit_data", cwd=away).returncode == 0
    assert "No module named 'torch'" in run(scripts / "python", "-c", "import torch", cwd=away).stderr


def test_help_lists_the_commands(scripts: Path, away: Path) -> None:
    shown = run(scripts / "matvit", "--help", cwd=away)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(command in shown.stdout for command in ("demo", "index", "search", "doctor"))


def test_doctor_says_what_is_missing_and_how_to_install_it(scripts: Path, away: Path) -> None:
    told = run(scripts / "matvit", "doctor", "--json", cwd=away)
    assert (told.returncode, told.stderr) == (1, "")
    report = json.loads(told.stdout)
    assert any(INSTALL_TORCH in problem for problem in report["problems"])
    assert all(state["problem"] is None for state in report["checkpoints"])


@pytest.mark.parametrize("arguments", [["info"], ["index", "."], ["demo", "--no-app"]])
def test_what_needs_torch_names_the_install_line(scripts: Path, away: Path, arguments: list[str]) -> None:
    told = run(scripts / "matvit", *arguments, cwd=away)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.count("\n") == 1
    assert INSTALL_TORCH in told.stderr


def test_searching_an_index_without_torch_names_the_install_line(scripts: Path, away: Path) -> None:
    index = ROOT / "tests" / "retrieval" / "formats" / "version-1"
    shutil.copytree(index, away / "photos.index", dirs_exist_ok=True)
    told = run(scripts / "matvit", "search", "picture.png", "--encoder", "S", cwd=away)
    assert (told.returncode, told.stdout) == (2, "")
    assert INSTALL_TORCH in told.stderr


def test_the_demo_photographs_are_found_from_any_folder(scripts: Path, away: Path) -> None:
    code = "from matvit_data import demo_photos; print(sum(photo.file.is_file() for photo in demo_photos()))"
    assert run(scripts / "python", "-c", code, cwd=away).stdout == "578\n"


def test_only_our_own_names_reach_site_packages(scripts: Path, away: Path) -> None:
    code = """
from importlib.metadata import files
print(*sorted({path.parts[0] for path in files("matvit-retrieval") if not path.parts[0].endswith(".dist-info")}))
"""
    names = set(run(scripts / "python", "-c", code, cwd=away).stdout.split()) - {".."}  # ..: bin/matvit
    assert names == {"matvit", "matvit_app", "matvit_data", "retrieval"}
