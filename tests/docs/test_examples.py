"""The scripts in examples/ run unchanged; TRL's are tested in tests/interop/test_trl.py."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.documented import ROOT, flags_of
from support.notebook import NOTEBOOK, notebook

EXAMPLES = ROOT / "examples"


SCRIPTS = ("llava_own_data", "vision_transformer")


@pytest.mark.filterwarnings("ignore:too little calibration")  # three pictures
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_saves_an_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.glob("*-adapter/adapter_model.safetensors"))


def test_the_notebook_runs_with_another_model_in_its_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the file in git, in order; a 7B changes the same cell."""
    monkeypatch.chdir(tmp_path)
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook(), "python tests/support/notebook.py writes it again"
    cells = ["".join(c["source"]) for c in json.loads(notebook())["cells"] if c["cell_type"] == "code"]
    (at,) = [number for number, cell in enumerate(cells) if cell.startswith("MODEL")]
    cells[at] = 'MODEL, RANK, STEPS = "tiny", 2, 4'
    variables: dict[str, Any] = {}
    for cell in cells:
        exec(cell, variables)
    assert len(variables["before"]) == len(variables["after"]) == 12
    before, after = variables["general_before"], variables["general_after"]
    assert len(before) == len(after) == 3
    assert list(tmp_path.glob("*-adapter/adapter_model.safetensors"))


def test_the_job_for_skypilot_has_flags_that_exist() -> None:
    sky = yaml.safe_load((EXAMPLES / "many_gpus.sky.yaml").read_text(encoding="utf-8"))
    assert {"name", "resources", "setup", "run"} <= sky.keys()
    (command,) = re.findall(r"-m (milora_vl\.train .*)", re.sub(r"\\\n\s*", "", sky["run"]))
    used = {word for word in command.split() if word.startswith("--")}
    assert used <= flags_of(f"python -m {command}")


PACKAGES = ("milora_vl", "data_tools/milora_data", "eval/milora_eval")

MODULES = [
    ".".join((Path(package).name, *path.relative_to(ROOT / package).with_suffix("").parts)).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


README_LINES, ALL_WORDS = 160, 22_000


def words(page: Path) -> int:
    return len(page.read_text(encoding="utf-8").split())


def test_readme_is_short() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_readme_and_the_pages_for_users_are_short() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # not those in contributing/
    assert sum(map(words, pages)) <= ALL_WORDS, {page.name: words(page) for page in pages}
