"""Links lead to files, make targets exist, no file names a machine, and imports inside functions have a reason."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from support.documented import PAGES, ROOT

PACKAGES = ("milora_vl/", "llava_recipes/", "data_tools/milora_data/", "eval/milora_eval/", "studies/")


# Letters in brackets keep this file from matching itself.
NOT_IN_THE_TREE = {
    "a home directory": r"(?<![\w.])(/roo[t]/|/hom[e]/\w|/User[s]/\w|C:\\User[s])",
    "a package registry's host": r"pyp[i]\.org|pythonhoste[d]|registry\.npmj[s]|download\.pytorc[h]",
}


TEXTS = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jinja", ".txt", ".cfg", ".html", ".css", ".js", ""}


# Files where functions import modules of ours, and why. The list may only shrink.
QUICK_HELP = "--help answers before torch is imported"


INNER_IMPORTS = {
    "milora_vl/demo.py": "torch, which --help does not wait for",
    "data_tools/milora_data/__init__.py": "the collator needs torch",
    "eval/milora_eval/commands/losses.py": QUICK_HELP,
    "eval/milora_eval/commands/run.py": QUICK_HELP,
    "eval/milora_eval/evaluator.py": "a report has the words of an evaluation and asks nothing",
    "milora_vl/analyze/__main__.py": QUICK_HELP,
    "milora_vl/chat/__main__.py": QUICK_HELP,
    "milora_vl/compose.py": QUICK_HELP,
    "milora_vl/export/__main__.py": QUICK_HELP,
    "milora_vl/forgetting/__main__.py": QUICK_HELP,
    "milora_vl/interop/llava.py": QUICK_HELP,
    "milora_vl/interop/replace.py": QUICK_HELP,
    "milora_vl/core/policy/policy.py": "reading rules needs no PEFT",
    "milora_vl/sweep/__main__.py": QUICK_HELP,
    "milora_vl/train/__main__.py": QUICK_HELP,
}


@cache
def tracked() -> list[Path]:
    """Files that git tracks or would track; without git (a source archive), all files outside build and run folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        skip = {".venv", "runs", "data", "build", "dist", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    call = re.compile(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z-]+)", re.MULTILINE)
    named = {target for page in PAGES for target in call.findall(page.read_text(encoding="utf-8"))}
    assert {"demo", "test"} <= named
    assert not named - targets


@pytest.mark.parametrize("page", [path for path in tracked() if path.suffix == ".md"], ids=name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("what", NOT_IN_THE_TREE)
def test_no_file_names(what: str) -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if re.search(NOT_IN_THE_TREE[what], line)
    ]
    assert not found


def has_inner_imports(path: Path) -> bool:
    """Whether functions import modules of ours; `compat` does not count, as its imports belong there."""
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    imports = {
        node for function in functions for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    ours = {package.strip("/").split("/")[-1] for package in PACKAGES}
    modules = ((node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports)
    return any(module.split(".")[0] in ours for module in modules if not module.startswith("milora_vl.common.compat"))


def test_imports_inside_functions_have_a_reason() -> None:
    sources = [path for path in tracked() if path.suffix == ".py" and name(path).startswith(PACKAGES)]
    assert {name(path) for path in sources if has_inner_imports(path)} == set(INNER_IMPORTS)


FOLDERS = ("milora_vl", "data_tools/milora_data", "eval/milora_eval", "studies")

PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")

ENTRIES = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)

TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in FOLDERS
    for path in sorted((ROOT / package).rglob("*.py"))
}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            yield f"{file}:{getattr(node, 'lineno', 0)}", node


def test_every_entry_of_the_page_is_a_code_and_none_has_two() -> None:
    texts = {node.value for _, node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert len(ENTRIES) == len(set(ENTRIES))
    assert [code for code in ENTRIES if code not in texts] == []


TRY = ["--device", "cpu", "--output"]


@pytest.mark.slow
def test_all_parts_run_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    parts = [name for name in gpu.PARTS if find_spec("trl") or not name.endswith("/trl")]
    assert gpu.main([*TRY, str(file), "--only", *parts]) == 0
    found = {name: entry["result"] for name, entry in json.loads(file.read_text()).items()}
    assert list(found) == parts
    for model in gpu.MODELS:
        for way in (*gpu.OURS, "hf"):
            assert found[f"{model}/{way}"]["tokens_per_second"] > 0
        assert found[f"{model}/milora"]["planned_gb"] > 0
        assert found[f"{model}/protected"].keys() >= {"texts_s", "calibration_s"}
    assert all(found[name]["start_s on 2"] > 0 for name in gpu.LAUNCHERS)
    assert found["demo"].keys() >= {"seconds", "score of the base", "score of the final"}
    table = capsys.readouterr().out
    assert f"{gpu.MODELS[0]}, speed" in table
    assert "milora over hf" in table


def test_a_failed_part_is_recorded_and_finished_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def apart(script: str, *words: object) -> Any:
        asked.append(words[1])
        return {
            "questions": {"error": "ValueError: too many questions"}, "demo": None
        }.get(str(words[1]), {"result": {"tokens_per_second": 5}})  # fmt: skip

    monkeypatch.setattr(gpu, "apart", apart)
    file = tmp_path / "gpu.json"
    assert [gpu.main([*TRY, str(file)]), gpu.main([*TRY, str(file)])] == [1, 1]
    assert asked == [*gpu.PARTS, "questions", "demo"], "only what has no result runs again"
    assert json.loads(file.read_text())["demo"]["error"] == "the process died"
    assert "failed ValueError: too many questions" in capsys.readouterr().out
