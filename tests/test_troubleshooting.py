"""Every problem has a code, and docs/troubleshooting.md has an entry for each code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
PACKAGES = ("milora_vl", "data_tools/milora_data", "eval/milora_eval")


def error_classes() -> set[str]:
    """The names of UserError and of all classes below it."""
    bases = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found, before = {"UserError"}, 0
    while len(found) != before:
        before = len(found)
        found |= {name for name, above in bases.items() if found & set(above)}
    return found


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def code_of(call: ast.Call) -> ast.expr | None:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    is_problem = isinstance(call.func, ast.Name) and call.func.id == "Problem"
    return named.get("code") or (call.args[1] if is_problem and len(call.args) > 1 else None)


def test_every_raised_error_has_a_code() -> None:
    classes = error_classes() - {"RecipeError", "MissingImages"}  # they add the code themselves
    lacking = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            call = node.exc
            if not (isinstance(call.func, ast.Name) and call.func.id in classes):
                continue
            names = {keyword.arg for keyword in call.keywords}
            if not names & {"code", "problems"} and call.args:
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not lacking


def test_every_code_has_one_entry_and_every_entry_is_a_code() -> None:
    used = {
        code.value
        for _, call in calls("Problem", *error_classes())
        if isinstance(code := code_of(call), ast.Constant) and code.value
    }
    assert len(ENTRIES) == len(set(ENTRIES))
    assert used - set(ENTRIES) == set()
    assert set(ENTRIES) - used - constants() == set()


def constants() -> set[str]:
    """Codes that a variable or a table holds."""
    return {
        node.value
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
