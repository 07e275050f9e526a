"""The documents hold: code in the README runs, commands exist, links lead somewhere, wheels are clean."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.main import get_command

from matvit_app.cli.main import cli
from matvit_data import demo_folder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_WHOLE = ("|", "    ", "Written by ")  # tables, commands, and how a page was generated


def test_the_readmes_python_runs_and_runs_again(tmp_path, monkeypatch):
    pictures = sorted((demo_folder() / "images" / "grocery-store").rglob("*.webp"))[:12]
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(pictures):
        shutil.copy(picture, tmp_path / "photos" / f"{number}.webp")
    shutil.copy(pictures[0], tmp_path / "query.jpg")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for _ in range(2):
        names: dict[str, object] = {}
        exec(compile(code, "README.md", "exec"), names)
        assert len(names["hits"]) == 10
        assert names["hits"][0].path.name == "0.webp"
        assert names["index"].info().items == 12


@pytest.mark.parametrize("name", ["searching", "evaluating"])
def test_what_can_be_pasted_in_a_checkout_runs(name, tmp_path):
    matvit = tmp_path / "bin" / "matvit"
    matvit.parent.mkdir()
    matvit.write_text(f"#!{sys.executable}\nimport sys\nfrom matvit_app.cli.main import main\nsys.exit(main())\n")
    matvit.chmod(0o755)
    (tmp_path / "data").symlink_to(ROOT / "data")
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / f"docs/guides/{name}.md").read_text(), flags=re.DOTALL)
    assert blocks
    environment = os.environ | {"PATH": f"{matvit.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e"], input=block, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
    if name == "searching":
        by_price, by_label = (
            set(re.findall(r"label=\w+, price=\d+", part)) for part in done.stdout.split("photo-3")[1:]
        )
        assert by_price == {"label=shoes, price=45", "label=hat, price=30"}
        assert by_label == by_price | {"label=shoes, price=20"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_in_the_documents_exists(page):
    commands = get_command(cli).commands
    for line in re.findall(r"^(?:.*&& )?matvit (.+?)(?:\s+#.*)?$", page.read_text(), flags=re.MULTILINE):
        name, *words = line.split()
        if name.startswith("-"):
            continue
        assert name in commands, f"{page.name}: matvit {line}"
        options = {option for parameter in commands[name].params for option in parameter.opts}
        used = {word.split("=")[0] for word in words if word.startswith("-")}
        assert used <= options | {"--help"}, f"{page.name}: matvit {line}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_wrapped_but_for_tables_and_code(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(_WHOLE)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links {target}"


def test_every_command_is_named_in_the_documents():
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in get_command(cli).commands if not re.search(rf"\bmatvit {name}\b", text)] == []


def test_a_wheel_carries_its_data_and_no_stray_top_level_names(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".*_cache", "build", "start", "runs", "tests", ".stage", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "matvit",
        "retrieval",
        "matvit_app",
        "matvit_data",
    }
    for part in (
        "matvit/py.typed",
        "matvit/bundled/matvit-small/model.safetensors",
        "matvit/training/recipes/matvit-small.yaml",
        "matvit_data/demo/demo.json",
        "matvit_app/ui/main.py",
    ):
        assert part in names
    assert sum(name.endswith(".webp") for name in names) == 578
