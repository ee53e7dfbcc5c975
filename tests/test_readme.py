"""The README and docs/ do what they say: snippets run, flags and make targets exist, links lead somewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<mark><!-- test -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; a bash block is run as a whole when the line before it is `<!-- test -->`."""

    page: str
    line: int
    language: str
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(content):
            line = content.count("\n", 0, match.start("text")) + 1
            marked = bool(match["mark"])
            found.append(Block(page.relative_to(ROOT).as_posix(), line, match["language"], match["text"], marked))
    return [block for block in found if block.language == language]


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def command_lines() -> list[tuple[str, str]]:
    """Every `python -m milora...` line of the bash blocks, with where it stands; comments are left out."""
    return [
        (str(block), shlex.join(shlex.split(line, comments=True)))
        for block in blocks("bash")
        for line in block.text.splitlines()
        if line.startswith("python -m milora")
    ]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_snippet_runs(block: Block, tmp_path: Path) -> None:
    run([sys.executable, "-c", block.text], tmp_path)


@pytest.mark.parametrize("block", [block for block in blocks("bash") if block.marked], ids=str)
def test_marked_commands_run(block: Block, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path)


@cache
def known_flags(*command: str) -> set[str]:
    shown = subprocess.run([sys.executable, "-m", *command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"--[\w-]+", shown.stdout.replace("-", "_").replace("__", "--")))


@pytest.mark.parametrize(("place", "line"), command_lines())
def test_flags_exist(place: str, line: str) -> None:
    """Each flag of a printed command is in that command's own help."""
    module, *rest = line.removeprefix("python -m ").split(">")[0].split()
    if module.startswith("milora_vl.integrations"):  # what follows the script is the script's own
        rest = rest[: next((at for at, word in enumerate(rest) if word.endswith(".py")), len(rest))]
    known = known_flags(module, *(rest[:1] if module in ("milora_data", "milora_eval") else []))
    flags = {word.replace("-", "_").replace("__", "--", 1) for word in rest if word.startswith("--")}
    assert not flags - known, place


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_recipe_is_valid(block: Block) -> None:
    from milora_vl.policy import Policy
    from milora_vl.recipe.schema import Recipe

    recipe = Recipe.parse(yaml.safe_load(block.text), str(block))
    if recipe.policy is not None:
        assert len(Policy.parse(recipe.policy).rules) == len(recipe.policy)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    call = re.compile(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z-]+)", re.MULTILINE)
    named = {target for page in PAGES for target in call.findall(page.read_text(encoding="utf-8"))}
    assert {"demo", "test"} <= named
    assert not named - targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_first_screen_has_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:12]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_the_demo_is_shown_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/demo.py` wrote both."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    demo = importlib.import_module("demo")
    found = json.loads((ROOT / "benchmarks" / "demo.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert demo.written(readme, found) == readme


def test_machines_without_a_network_are_told_of_the_pinned_wheels() -> None:
    from milora_data.assets import ASSETS

    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [asset.requirement for asset in ASSETS.values() if asset.requirement not in page] == []
