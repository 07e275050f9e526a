"""The house is in order: one set of commands, import contracts, decisions in their form, public names documented."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", MAKEFILE, flags=re.MULTILINE))
CI = (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", ["lint", "types", "test", "clean-install"])
def test_ci_runs_what_make_runs(target: str) -> None:
    commands = [line.strip() for line in TARGETS[target].splitlines()]
    assert commands
    for command in commands:
        assert re.search(rf"^step \w+ {re.escape(command)}$", CI, flags=re.MULTILINE), command


def test_ci_installs_and_tests_with_the_readmes_commands() -> None:
    [line] = re.findall(r"^(pip install -e .*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    install, test = line.split(" && ")
    assert f"must install {install.replace('pip install', 'pip install -q')}\n" in CI
    assert f"step tests {test}\n" in CI


def test_the_last_thing_that_ci_runs_is_the_whole_suite() -> None:
    assert re.findall(r"^(?:step|must) (.*)$", CI, flags=re.MULTILINE)[-1] == "tests pytest -n auto"


def test_every_dependency_at_run_time_has_one_lower_bound_that_can_be_installed() -> None:
    """`.ci/lower-bounds` installs just these versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [wanted for name, wanted in project["optional-dependencies"].items() if name != "dev"]
    for one in chain(project["dependencies"], *extras):
        assert re.fullmatch(r"[\w-]+>=[\d.]+(; .+)?|matvit-retrieval\[[\w,]+\]", one), one


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_is_named_exists(page: str) -> None:
    assert set(re.findall(r"\bmake ([a-z-]+)", (ROOT / page).read_text())) <= set(TARGETS)


def test_import_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_a_name_for_a_type_of_arrays_has_one_home() -> None:
    parts = "matvit", "retrieval", "app", "data", "benchmarks"
    sources = [path.read_text() for part in parts for path in ROOT.glob(f"{part}/**/*.py")]
    names = [name for text in sources for name in re.findall(r"^(\w+) = (?:npt\.)?NDArray", text, re.MULTILINE)]
    assert len(names) > 5
    assert sorted(names) == sorted(set(names))


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_says_what_why_and_when_to_undo_it_in_20_lines(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith(f"# {page.name[:4]} ")
    parts = [re.match(r"\*\*(.*?)\.?\*\*", line) for line in lines]
    assert [part[1] for part in parts if part] == ["Context", "Decision", "Rejected", "Cost", "Undo when"]


@pytest.mark.parametrize("package", ["matvit", "retrieval"])
def test_public_names_and_their_methods_are_documented(package: str) -> None:
    """Each by itself: a base class's words, or the signature that a dataclass gives itself, do not count."""
    module = importlib.import_module(package)
    for name in module.__all__:
        public = vars(getattr(module, name))
        said = public["__doc__"] or ""
        assert said.strip(), name
        assert not said.startswith(f"{name}("), name
        for member, value in public.items():
            if not member.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                assert value.__doc__, f"{name}.{member}"


def test_every_package_is_named_for_the_wheel() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join([name, *found.parent.relative_to(ROOT / folder).parts])
        for name, folder in {"matvit": "matvit", "retrieval": "retrieval", **tool["package-dir"]}.items()
        for found in (ROOT / folder).rglob("__init__.py")
    }
    assert there == set(tool["packages"])
