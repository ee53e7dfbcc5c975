"""Links lead to files, make targets exist, no file names a machine, and imports inside functions have a reason."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

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
    "eval/milora_eval/commands/run.py": QUICK_HELP,
    "eval/milora_eval/evaluator.py": "a report has the words of an evaluation and asks nothing",
    "milora_vl/analyze/__main__.py": QUICK_HELP,
    "milora_vl/chat/command.py": QUICK_HELP,
    "milora_vl/compose/__main__.py": QUICK_HELP,
    "milora_vl/export/command.py": QUICK_HELP,
    "milora_vl/forgetting/__main__.py": QUICK_HELP,
    "milora_vl/interop/llava.py": QUICK_HELP,
    "milora_vl/interop/replace.py": QUICK_HELP,
    "milora_vl/core/policy/policy.py": "reading rules needs no PEFT",
    "milora_vl/sweep/__main__.py": QUICK_HELP,
    "milora_vl/train/command.py": QUICK_HELP,
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
    """Whether functions import modules of ours; those of `compat`, which belong there, do not count."""
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
